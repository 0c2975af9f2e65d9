"""How many operations a step asks of PyTorch: what a GPU's host must launch, counted on any machine.

An operation is one call of PyTorch's dispatcher, forward or backward, that is not a view. The number depends on layers
and stages, not on widths. So the model is counted at small widths: at full width a CPU cuts pack and optimizer into
pieces that fit its cache, which do not count.
"""

from dataclasses import replace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from est_cli.benchmark.case import Case
from est_cli.benchmark.measure import Stepper

_HEAD_DIM, _BLOCKS, _VOCABULARY, _TOKENS = 2, 8, 64, 8
_COPIES_NOTHING = {"aten::_unsafe_view", "aten::_reshape_alias"}
"""Views that the dispatcher does not mark as such."""


class Operations(TorchDispatchMode):
    """`names` are the operations called under it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name().split(".")[0] not in _COPIES_NOTHING:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def count_operations(case: Case) -> dict[str, Any]:
    """Operations of one optimizer step of every stage: pack; forward and backward; norm, clip and AdamW."""
    stages = []
    with Operations() as operations:
        stepper = Stepper(narrow(case), now=lambda: len(operations.names))
        for index in range(len(case.stages)):
            stepper.step(index)  # what only the first step of a stage allocates
            found = {phase: int(count) for phase, count in stepper.step(index).items()}
            found["forward_backward"] = found["forward"] + found["backward"]
            stages.append({"stage": index + 1, **{key: found[key] for key in ("pack", "forward_backward", "update")}})
    return {"stages": stages}


def narrow(case: Case) -> Case:
    """The same layers, heads and stages in small widths."""
    widths = {
        "d_model": _HEAD_DIM * case.model.n_heads,
        "head_dim": _HEAD_DIM,
        "d_ff": _BLOCKS * case.sampling.mlp_block,
    }
    small = replace(case.model, **widths, vocab_size=_VOCABULARY, max_seq_len=_TOKENS)
    return replace(case, model=small, batch_size=1, seq_len=_TOKENS)
