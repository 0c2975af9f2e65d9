"""AdamW (Loshchilov and Hutter, 2019) on sampled rows, one pass over what moves.

Clip scale, decay, moments and the scatter of the sampled rows happen chunk by chunk: a chunk fits in the cache,
and gradients of a sampled tensor's full size never exist. Where all rows have taken as many steps, PyTorch's own
fused kernel moves a chunk, so that the bits are those of torch.optim.AdamW(fused=True).

A tensor is seen as a matrix [R, C] of rows; `rows` are the sampled ones, ascending.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 1 << 19
CUDA_CHUNK_ELEMENTS = 1 << 26
LANES = 16
"""Elements of a vector register: the fused kernel rounds what is left over of a chunk otherwise."""


@dataclass(frozen=True)
class Hyperparameters:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Rows:
    """Ascending row indices, on the host and on the device."""

    host: np.ndarray
    device: Tensor


@dataclass(frozen=True)
class Move:
    """One parameter's part in an optimizer step.

    parameter, moment, square [R, C]; gradient [R, C], or [r, C] for `rows`, or None for no gradient at all.
    counts is the number of the step, from 1: an int, and then every row takes it, with gradient 0 where there
    is none; or one for each row of the gradient, and then only those rows move.
    """

    parameter: Tensor
    moment: Tensor
    square: Tensor
    gradient: Tensor | None
    rows: Rows | None
    counts: int | np.ndarray
    hyper: Hyperparameters


@torch.no_grad()
def adamw_step(moves: Sequence[Move], clip: Tensor | None) -> None:
    """Each parameter takes its step; clip is the scale of the gradients, a scalar tensor."""
    for m in moves:
        step = step_all_rows if isinstance(m.counts, int) else step_sampled_rows
        step(m.parameter, m.moment, m.square, m.gradient, m.rows, m.hyper, clip, m.counts)


def step_all_rows(
    parameter: Tensor,
    moment: Tensor,
    square: Tensor,
    gradient: Tensor | None,
    rows: Rows | None,
    hyper: Hyperparameters,
    clip: Tensor | None,
    count: int,
) -> None:
    """Every row takes its `count`-th step; rows without a gradient take it with gradient 0.

    parameter, moment, square [R, C]; gradient [R, C], or [r, C] for `rows`, or None for no gradient at all;
    clip is the scale of the gradients, a scalar tensor.
    """
    if rows is None:
        flat = [None if t is None else t.reshape(-1, 1) for t in (parameter, moment, square, gradient)]
        parameter, moment, square, gradient = flat
    height = _chunk_height(parameter)
    scratch = torch.zeros_like(parameter[:height])
    taken = torch.full((), count, dtype=torch.float32, device=parameter.device)
    for start in range(0, len(parameter), height):
        chunk = slice(start, min(start + height, len(parameter)))
        g = scratch[: chunk.stop - start]
        if gradient is not None:
            g = _chunk_of_gradient(gradient, rows, chunk, clip, out=g)
        torch._fused_adamw_(
            [parameter[chunk]],
            [g],
            [moment[chunk]],
            [square[chunk]],
            [],
            [taken],
            lr=hyper.lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            amsgrad=False,
            maximize=False,
        )


def _chunk_of_gradient(gradient: Tensor, rows: Rows | None, chunk: slice, clip: Tensor | None, out: Tensor) -> Tensor:
    """The clipped gradient of the rows in `chunk`, 0 where a row was not sampled."""
    if rows is None:
        return gradient[chunk] if clip is None else torch.mul(gradient[chunk], clip, out=out)
    low, high = np.searchsorted(rows.host, (chunk.start, chunk.stop))
    out.zero_().index_copy_(0, rows.device[low:high] - chunk.start, gradient[low:high])
    return out if clip is None else out.mul_(clip)


def step_sampled_rows(
    parameter: Tensor,
    moment: Tensor,
    square: Tensor,
    gradient: Tensor,
    rows: Rows | None,
    hyper: Hyperparameters,
    clip: Tensor | None,
    counts: np.ndarray,
) -> None:
    """Only the sampled rows move: each takes the step that its own count says.

    parameter, moment, square [R, C]; gradient [r, C]; counts [r] of int, from 1.
    """
    if counts.min() == counts.max() and rows is None:
        step_all_rows(parameter, moment, square, gradient, None, hyper, clip, int(counts[0]))
        return
    first, second = (torch.from_numpy(c).to(parameter)[:, None] for c in corrections(hyper, counts))
    height = _chunk_height(parameter)
    for start in range(0, len(gradient), height):
        part = slice(start, start + height)
        index = part if rows is None else rows.device[part]
        p, m, v = parameter[index], moment[index], square[index]
        g = gradient[part] if clip is None else gradient[part] * clip
        p.mul_(1 - hyper.lr * hyper.weight_decay)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        p.addcdiv_(m * (hyper.lr / first[part]), v.sqrt().div_(second[part]).add_(hyper.eps), value=-1)
        if rows is not None:
            for whole, moved in ((parameter, p), (moment, m), (square, v)):
                whole.index_copy_(0, index, moved)


def corrections(hyper: Hyperparameters, count):
    """1 − β1^t and √(1 − β2^t), for one count or an array of them."""
    return 1 - hyper.beta1**count, (1 - hyper.beta2**count) ** 0.5


def _chunk_height(matrix: Tensor) -> int:
    """Rows of a chunk: a chunk ends where a vector register does."""
    elements = CUDA_CHUNK_ELEMENTS if matrix.is_cuda else CPU_CHUNK_ELEMENTS
    multiple = LANES // math.gcd(LANES, matrix.shape[1])
    return min(len(matrix), max(1, elements // matrix.shape[1] // multiple) * multiple)
