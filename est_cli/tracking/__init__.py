"""What a run tells people and machines: metrics.jsonl and its copies, Weights & Biases, the terminal, the summary."""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
