"""Training: a run's loop, and everything that one of its steps needs.

loop                the run: stage by stage, and one method per phase of a step
inputs              the plan and the tokens of a step; on a GPU those of the next one are made ahead
subnetwork          the sampled rows packed into a small model (also one that ranks share, or a masked one)
stacks              where masters and moments lie: equally wide rows of all layers in one matrix
optimizer           learning rate, AdamW on the sampled rows, and layers that join
steps               whether a step was finite, read later; its progress and its line of metrics.jsonl
validation          mean losses over windows
checkpoint          a run's checkpoints on disk, and when they are written
sharded_checkpoint  the tensors of one whose state ranks share
files               files of tensors, and checksums
nonfinite           a step that was not finite, kept and run again
pretrained          weights to start from
distributed         how the processes of a run meet, and what they hold and compute together
device              peak rate, compiler and memory
profile             traces of a few steps
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
