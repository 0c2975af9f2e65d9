"""What a run tells people and machines.

tracker        what a tracker hears of a run; the class to derive one from
metrics        metrics.jsonl, the record that the others read
display        the live panel, or plain lines
loggers        what `logger=` chooses: W&B, TensorBoard, CSV
wandb_process  the process that feeds W&B
summary        summary.json and the table that a run ends with
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
