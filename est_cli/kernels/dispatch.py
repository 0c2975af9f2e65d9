"""Which version of the three operations a model uses: PyTorch's, or Triton's on a GPU."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from est_cli.errors import UserError
from est_cli.kernels import adamw, linear_cross_entropy, pack
from est_cli.kernels.adamw import Move


class Kernels(NamedTuple):
    """The memory-bound operations of a step, all in one version. They keep no state."""

    gather_rows: Callable[[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]], None]
    adamw_step: Callable[[Sequence[Move], Tensor | None], None]
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]


TORCH = Kernels(pack.gather_rows, adamw.adamw_step, linear_cross_entropy.linear_cross_entropy)


def kernels_for(choice: str, device: torch.device | str) -> Kernels:
    """The version for kernels=`choice`: Triton's where it is asked for, PyTorch's otherwise.

    `auto` stays with PyTorch's until Triton's have been measured on a GPU. kernels=masked differs in the model
    alone. Raises UserError where kernels=triton cannot be had.
    """
    check_kernels(choice, device)
    return triton_kernels() if choice == "triton" else TORCH


def check_kernels(choice: str, device: torch.device | str) -> None:
    """Raises UserError where kernels=triton cannot be had."""
    if choice == "triton" and not has_triton(device):
        missing = "a GPU" if torch.device(device).type != "cuda" else "the package triton, which is not installed"
        raise UserError(f"kernels=triton: needs {missing}; allowed here: auto, torch, masked")


def has_triton(device: torch.device | str) -> bool:
    """Whether Triton's version runs on this device."""
    return torch.device(device).type == "cuda" and find_spec("triton") is not None


def triton_kernels() -> Kernels:
    """Triton's version. It is imported here, so that a run on a CPU never imports it."""
    from est_cli.kernels import triton_adamw, triton_linear_cross_entropy, triton_pack

    return Kernels(triton_pack.gather_rows, triton_adamw.adamw_step, triton_linear_cross_entropy.linear_cross_entropy)
