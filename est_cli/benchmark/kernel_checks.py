"""Kernels against float64 at odd and aligned shapes: how far off they are, and how far PyTorch's own version is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from est_cli.benchmark.kernel_cases import (
    Matrix,
    adamw_case,
    copied,
    head_case,
    loss_and_gradients,
    pack_case,
    plain_loss,
    plain_pack,
)
from est_cli.kernels.adamw import Move
from est_cli.kernels.dispatch import TORCH, Kernels

ODD = [Matrix(7, 5, 3), Matrix(4, 1, 2), Matrix(9, 300, 4), Matrix(1, 37), Matrix(6, 7, 0), Matrix(3, 3)]
"""No multiples of a tile or of 16, of one column, of one row, of a layer that is skipped."""
ALIGNED = [Matrix(6, 48, 2), Matrix(11, 16, 5), Matrix(3, 4096, 2), Matrix(5, 32), Matrix(5, 32, 0)]
SETS = {"odd": ODD, "aligned": ALIGNED, "mixed": ODD + ALIGNED}
HEADS = [(5, 7, 11), (37, 13, 101), (3, 8, 64), (2, 5, 8192), (3, 4, 2 * 8192 + 123)]
"""N tokens, D d_model, V vocabulary: less than a block of Triton's kernel, exactly one, and more."""


@dataclass(frozen=True)
class Check:
    """An error beside the largest that is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # also False for NaN


def check_pack(
    kernels: Kernels, matrices: Sequence[Matrix], dtype: torch.dtype, device: torch.device
) -> Iterator[Check]:
    """Slots are exact copies of the rows, rounded as torch rounds."""
    case = pack_case(matrices, dtype, device)
    plain_pack(case)
    expected = [slot.clone() for slot in case.slots]
    for slot in case.slots:
        slot.fill_(torch.nan)
    kernels.gather_rows(case.sources, case.rows, case.slots)
    wrong = sum((found != right).sum().item() for found, right in zip(case.slots, expected, strict=True))
    yield Check("elements that differ", wrong, 0)


def check_adamw(
    kernels: Kernels, matrices: Sequence[Matrix], freeze: bool, clip: float | None, device: torch.device
) -> Iterator[Check]:
    """Three steps: at most twice as far from float64's as torch's float32 version."""
    moves = adamw_case(matrices, freeze, device)
    scale = None if clip is None else torch.tensor(clip, device=device)
    found = _three_steps(kernels.adamw_step, moves, scale, torch.float32)
    usual = _three_steps(TORCH.adamw_step, moves, scale, torch.float32)
    exact = _three_steps(TORCH.adamw_step, moves, scale, torch.float64)
    for name in ("parameter", "moment", "square"):
        ours, theirs, truth = (torch.cat([getattr(m, name).flatten() for m in made]) for made in (found, usual, exact))
        yield Check(name, (ours - truth).abs().max().item(), 2 * (theirs - truth).abs().max().item())


def check_loss(kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype, device) -> Iterator[Check]:
    """The loss and both gradients: at most twice as far from float64's as the plain path's."""
    inputs = head_case(*shape, dtype, device)
    ours, theirs = loss_and_gradients(kernels.linear_cross_entropy, *inputs), loss_and_gradients(plain_loss, *inputs)
    truth = loss_and_gradients(plain_loss, *(t.detach().double().requires_grad_() for t in inputs[:2]), inputs[2])
    for name, a, b, c in zip(("loss", "hidden", "weight"), ours, theirs, truth, strict=True):
        error, plain_error = ((t.double() - c).norm().item() for t in (a, b))
        yield Check(name, error, 2 * plain_error + 1e-6 * c.norm().item())


def _three_steps(
    step: Callable[[Sequence[Move], Tensor | None], None], moves: list[Move], clip: Tensor | None, dtype: torch.dtype
) -> list[Move]:
    """Copies of the moves after three steps."""
    moves = copied(moves, dtype)
    clip = None if clip is None else clip.to(dtype)
    for later in range(3):
        step([replace(move, counts=move.counts + later) for move in moves], clip)
    return moves


def all_checks(kernels: Kernels, device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, Iterator[Check]]:
    """Every check at every shape, by operation."""

    def packs() -> Iterator[Check]:
        for name, matrices in SETS.items():
            for dtype in dtypes:
                yield from _named(f"{name} {dtype}", check_pack(kernels, matrices, dtype, device))

    def steps() -> Iterator[Check]:
        for name, matrices in SETS.items():
            for freeze in (False, True):
                for clip in (None, 0.37):
                    what = f"{name} {'freeze' if freeze else 'zero_grad'} clip={clip}"
                    yield from _named(what, check_adamw(kernels, matrices, freeze, clip, device))

    def losses() -> Iterator[Check]:
        for shape in HEADS:
            for dtype in dtypes:
                yield from _named(f"{shape} {dtype}", check_loss(kernels, shape, dtype, device))

    return {"pack": packs(), "adamw": steps(), "loss": losses()}


def _named(what: str, checks: Iterator[Check]) -> Iterator[Check]:
    for check in checks:
        yield replace(check, name=f"{what}: {check.name}")
