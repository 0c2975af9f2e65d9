"""Training: a run's loop, and all that its steps need.

loop                the run: stage by stage, and one method per phase of a step
inputs              the plan and the tokens of a step, on a GPU made one step ahead
subnetwork          the sampled rows packed into a small model, which ranks can share; or the full model, masked
stacks              the memory of masters and moments: equally wide rows of all layers in one matrix
optimizer           learning rate, AdamW on the sampled rows, and layers that join
steps               what the host reads of a step: whether it was finite, and its line of metrics.jsonl
validation          mean losses over windows
checkpoint          a run's checkpoints on disk, and when they are written
sharded_checkpoint  the tensors of a checkpoint whose state ranks share
files               files of tensors, and checksums
nonfinite           a step that was not finite, kept and run again
pretrained          weights to start from
distributed         the processes of a run: how they meet, what each holds, what they compute together
device              peak rate and compiler; memory and threads of this process
profile             traces of a few steps
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
