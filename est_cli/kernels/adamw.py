"""AdamW (Loshchilov and Hutter, 2019) on sampled rows, in one pass over what moves.

Clip scale, decay, moments and the scatter of the sampled rows happen chunk by chunk. On a CPU a chunk fits in the
cache; on a GPU the memory for its gradients limits it. The full-size gradient of a sampled matrix only ever exists for
one chunk. PyTorch's fused kernel moves rows that have taken equally many steps, a whole chunk in one call, with the
bits of torch.optim.AdamW(fused=True).

A matrix [R, C] holds the rows of one parameter, or of several one after the other; `rows` are the sampled ones,
ascending.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from est_cli.kernels.pack import CHUNK_ELEMENTS, upload

LANES = 16
"""Elements of a vector register. The fused kernel rounds a tensor's last, incomplete register differently."""


@dataclass(frozen=True)
class Hyperparameters:
    """The names are those of torch._fused_adamw_."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Move:
    """One matrix's part in an optimizer step.

    parameter, moment, square [R, C]; gradients: matrices [r, C] one after the other, for `rows` (None: all rows); empty
    if there is no gradient. counts is the number of the step, from 1. If it is an int, every row takes that step, with
    gradient 0 if it has none; if it is an array, one for each row of the gradients, only those rows move.
    `ends`: the rows at which the parameters in the matrix end.
    """

    parameter: Tensor
    moment: Tensor
    square: Tensor
    gradients: Sequence[Tensor]
    rows: np.ndarray | None
    counts: int | np.ndarray
    hyper: Hyperparameters
    ends: Sequence[int] = ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parameter, self.moment, self.square

    @property
    def gradient(self) -> Tensor:
        """The gradients in one matrix [r, C]."""
        return _joined(self.gradients)

    def part(self, start: int, stop: int) -> "Move":
        """The move of rows start … stop − 1 only, with the same counts: an int."""
        low, high, rows = start, stop, self.rows
        if rows is not None:
            low, high = np.searchsorted(rows, (start, stop)).tolist()
            rows = None if high - low == stop - start else rows[low:high] - start
        tensors = (tensor[start:stop] for tensor in self.tensors)
        ends = [*(end - start for end in self.ends if start < end < stop), stop - start]
        return Move(*tensors, _rows_between(self.gradients, low, high), rows, self.counts, self.hyper, ends)


def _rows_between(matrices: Sequence[Tensor], low: int, high: int) -> list[Tensor]:
    """Views of rows low … high − 1 of matrices that lie one below the other."""
    found, end = [], 0
    for matrix in matrices:
        start, end = end, end + len(matrix)
        if start < high and low < end:
            found.append(matrix[max(low - start, 0) : high - start])
    return found


def _joined(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


@torch.no_grad()
def adamw_step(moves: Sequence[Move], clip: Tensor | None, refused: Tensor | None = None) -> None:
    """Move each matrix; clip, a scalar tensor, scales the gradients.

    If `refused`, a scalar float tensor, is 1, nothing moves. The device decides that; the host does not wait.
    """

    def group(move: Move) -> tuple[int, float]:
        return move.counts, move.hyper.weight_decay

    alike = sorted((_in_pieces(move) for move in moves if isinstance(move.counts, int)), key=group)
    groups = [list(_chunks(list(some))) for _, some in groupby(alike, key=group)]
    if groups:
        largest = max(sum(part.parameter.numel() for part in chunk) for chunks in groups for chunk in chunks)
        scratch = moves[0].parameter.new_empty(largest)
    for chunks in groups:
        count = torch.full((), chunks[0][0].counts, dtype=torch.float32, device=scratch.device)
        for chunk in chunks:
            _step_chunk(chunk, count, clip, refused, scratch)
    for move in moves:
        if not isinstance(move.counts, int):
            _step_sampled_rows(move, clip, refused)


def _in_pieces(move: Move) -> Move:
    """The same move with `ends` where a chunk may end; the fused kernel gets the rows between them as one tensor.

    If all rows have a gradient, or none has, elements become rows, so that a chunk may end in the middle of a long row.
    If some parameter ends within a vector register, every parameter ends a piece, so its bits are those that it has by
    itself.
    """
    if move.rows is None:
        width = move.parameter.shape[1]
        flat = (tensor.reshape(-1, 1) for tensor in move.tensors)
        gradients = [gradient.reshape(-1, 1) for gradient in move.gradients]
        move = Move(*flat, gradients, None, move.counts, move.hyper, [end * width for end in move.ends])
    n, columns = move.parameter.shape
    multiple = LANES // math.gcd(LANES, columns)
    height = max(1, CHUNK_ELEMENTS[move.parameter.device.type] // columns // multiple) * multiple
    ends = move.ends if any(end * columns % LANES for end in move.ends) else [n]
    pieces = [min(start + height, end) for first, end in pairwise([0, *ends]) for start in range(first, end, height)]
    return replace(move, ends=pieces)


def _chunks(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """All rows of the moves, in lists of parts that hold as many pieces as fit in a chunk."""
    limit = CHUNK_ELEMENTS[moves[0].parameter.device.type]
    chunk, room = [], limit
    for move in moves:
        columns, start, stop = move.parameter.shape[1], 0, 0
        for end in move.ends:
            if (end - start) * columns > room and (chunk or stop > start):
                if stop > start:
                    chunk.append(move.part(start, stop))
                yield chunk
                chunk, room, start = [], limit, stop
            stop = end
        chunk.append(move.part(start, stop))
        room -= (stop - start) * columns
    yield chunk


def _step_chunk(
    chunk: Sequence[Move], count: Tensor, clip: Tensor | None, refused: Tensor | None, scratch: Tensor
) -> None:
    columns = (*zip(*(part.tensors for part in chunk), strict=True), _clipped_gradients(chunk, clip, scratch))
    parameters, moments, squares, gradients = (
        [piece for part, tensor in zip(chunk, column, strict=True) for piece in tensor.tensor_split(part.ends[:-1])]
        for column in columns
    )
    options = {"amsgrad": False, "maximize": False, "found_inf": refused, **vars(chunk[0].hyper)}
    torch._fused_adamw_(parameters, gradients, moments, squares, [], [count] * len(parameters), **options)


def _clipped_gradients(chunk: Sequence[Move], clip: Tensor | None, scratch: Tensor) -> list[Tensor]:
    """The clipped gradient of every part, 0 in rows that were not sampled; in `scratch` unless one is used as it is."""
    if len(chunk) == 1 and chunk[0].gradients and chunk[0].rows is None:
        found = chunk[0].gradient
        return [found if clip is None else torch.mul(found, clip, out=scratch[: found.numel()].view_as(found))]
    sizes = [part.parameter.numel() for part in chunk]
    scratch = scratch[: sum(sizes)]
    outs = [out.view_as(part.parameter) for out, part in zip(scratch.split(sizes), chunk, strict=True)]
    if any(part.rows is not None or not part.gradients for part in chunk):
        scratch.zero_()
    whole, targets = [], []
    for part, out in zip(chunk, outs, strict=True):
        if part.rows is None:
            whole += part.gradients
            targets += out.split([len(gradient) for gradient in part.gradients]) if part.gradients else []
        elif part.gradients:
            out.index_copy_(0, upload(part.rows, out.device), part.gradient)
    if whole:
        torch._foreach_copy_(targets, whole)
    if clip is not None:
        scratch.mul_(clip)
    return outs


def _step_sampled_rows(move: Move, clip: Tensor | None, refused: Tensor | None) -> None:
    """Move only the sampled rows, each by its own count."""
    hyper, device = move.hyper, move.parameter.device
    height = max(1, CHUNK_ELEMENTS[device.type] // move.parameter.shape[1])
    index = upload(np.arange(len(move.counts)) if move.rows is None else move.rows, device)
    factors = (upload(c, device).to(move.parameter.dtype)[:, None] for c in corrections(hyper, move.counts))
    parts = zip(index.split(height), *(factor.split(height) for factor in factors), strict=True)
    for start, (rows, first, second) in zip(range(0, len(index), height), parts, strict=True):
        old = [tensor[rows] for tensor in move.tensors]
        p, m, v = old if refused is None else (tensor.clone() for tensor in old)
        g = _joined(_rows_between(move.gradients, start, start + len(rows)))
        g = g if clip is None else g * clip
        p.mul_(1 - hyper.lr * hyper.weight_decay)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        p.addcdiv_(m * (hyper.lr / first), v.sqrt().div_(second).add_(hyper.eps), value=-1)
        for whole, before, moved in zip(move.tensors, old, (p, m, v), strict=True):
            whole.index_copy_(0, rows, moved if refused is None else torch.where(refused == 1, before, moved))


def corrections(hyper: Hyperparameters, count):
    """1 − β1^t and √(1 − β2^t), for one count or an array of them."""
    return 1 - hyper.beta1**count, (1 - hyper.beta2**count) ** 0.5
