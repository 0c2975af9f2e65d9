"""AdamW (Loshchilov and Hutter, 2019) on sampled rows, one pass over what moves.

Clip scale, decay, moments and the scatter of the sampled rows happen chunk by chunk: a chunk fits in the cache,
and gradients of a sampled tensor's full size never exist. The arithmetic is torch.optim.AdamW's, operation by
operation, so that equal gradients give equal bits.

A tensor is seen as a matrix [R, C] of rows; `rows` are the sampled ones, ascending.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 1 << 19
CUDA_CHUNK_ELEMENTS = 1 << 26


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
    spread, scratch = (torch.empty_like(parameter[:height]) for _ in range(2))
    for start in range(0, len(parameter), height):
        stop = min(start + height, len(parameter))
        p, g = parameter[start:stop], None
        if gradient is not None and rows is None:
            g = gradient[start:stop]
        elif gradient is not None:
            low, high = np.searchsorted(rows.host, (start, stop))
            g = spread[: len(p)].zero_().index_copy_(0, rows.device[low:high] - start, gradient[low:high])
        if g is not None and clip is not None:
            g = torch.mul(g, clip, out=spread[: len(p)])
        _step(p, moment[start:stop], square[start:stop], g, hyper, *corrections(hyper, count), scratch[: len(p)])


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
    scratch = torch.empty_like(parameter[:height])
    for start in range(0, len(gradient), height):
        part = slice(start, start + height)
        index = part if rows is None else rows.device[part]
        p, m, v = parameter[index], moment[index], square[index]
        g = gradient[part] if clip is None else gradient[part] * clip
        _step(p, m, v, g, hyper, first[part], second[part], scratch[: len(p)])
        if rows is not None:
            for whole, moved in ((parameter, p), (moment, m), (square, v)):
                whole.index_copy_(0, index, moved)


def _step(
    p: Tensor, m: Tensor, v: Tensor, g: Tensor | None, hyper: Hyperparameters, first, second, scratch: Tensor
) -> None:
    """One AdamW step in place, g = None for zeros; `first` and `second` are the corrections, numbers or [rows, 1]."""
    if hyper.weight_decay:
        p.mul_(1 - hyper.lr * hyper.weight_decay)
    m.lerp_(m.new_zeros(()) if g is None else g, 1 - hyper.beta1)
    v.mul_(hyper.beta2)
    if g is not None:
        v.addcmul_(g, g, value=1 - hyper.beta2)
    denominator = torch.sqrt(v, out=scratch).div_(second).add_(hyper.eps)
    if isinstance(first, Tensor):
        p.sub_(m.mul(hyper.lr / first).div_(denominator))
    else:
        p.addcdiv_(m, denominator, value=-(hyper.lr / first))


def corrections(hyper: Hyperparameters, count):
    """1 − β1^t and √(1 − β2^t), for one count or an array of them."""
    return 1 - hyper.beta1**count, (1 - hyper.beta2**count) ** 0.5


def _chunk_height(matrix: Tensor) -> int:
    elements = CUDA_CHUNK_ELEMENTS if matrix.is_cuda else CPU_CHUNK_ELEMENTS
    return min(len(matrix), max(1, elements // matrix.shape[1]))
