"""Step timing: the stages of a schedule, and a peer, interleaved in one process. Needs only torch and numpy.

case     what is measured: a model, its stages, the tokens of a step
steps    its optimizer steps by phases, in seconds or in operations
measure  interleaved rounds, and ratios against the full model and a peer
peer     the same architecture in the code of transformers, nanoGPT or litgpt
kernels  pack, AdamW and the loss by themselves
goals    make bench: this CPU's numbers beside their goals
gpu      make gpu: all to measure on a GPU
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
