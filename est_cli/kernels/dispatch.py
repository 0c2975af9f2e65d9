"""Which version of the three operations a model uses: PyTorch's, or Triton's on a GPU."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from est_cli.errors import UserError
from est_cli.kernels import adamw, linear_cross_entropy, pack


class Kernels(NamedTuple):
    """One version of the three fused operations of a step. They keep no state."""

    gather_rows: Callable[..., None]
    adamw_step: Callable[..., None]
    linear_cross_entropy: Callable[..., Tensor]


TORCH = Kernels(pack.gather_rows, adamw.adamw_step, linear_cross_entropy.linear_cross_entropy)


def kernels_for(choice: str, device: torch.device | str) -> Kernels:
    """The version for kernels=`choice`: Triton's if asked for, otherwise PyTorch's.

    `auto` stays with PyTorch's until Triton's have been measured on a GPU. kernels=masked differs only in the model.
    Raises UserError if kernels=triton is asked for and cannot run.
    """
    if choice != "triton":
        return TORCH
    if not has_triton(device):
        missing = "a GPU" if torch.device(device).type != "cuda" else "the package triton, which is not installed"
        raise UserError(f"kernels=triton: needs {missing}; allowed here: auto, torch, masked")
    return triton_kernels()


def has_triton(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda" and find_spec("triton") is not None


def triton_kernels() -> Kernels:
    """Triton's version, imported here so that a run on a CPU never imports triton."""
    from est_cli.kernels import triton_kernels as triton

    return Kernels(triton.gather_rows, triton.adamw_step, triton.linear_cross_entropy)
