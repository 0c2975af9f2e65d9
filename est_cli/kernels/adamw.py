"""AdamW (Loshchilov and Hutter, 2019) on sampled rows, one pass over what moves.

Clip scale, decay, moments and the scatter of the sampled rows happen chunk by chunk. On a CPU a chunk fits in the
cache; on a GPU the memory for its gradients limits it. The full-size gradient of a sampled matrix only ever exists for
one chunk. PyTorch's fused kernel moves rows that have taken equally many steps, all parts of a chunk in one call,
with the bits of torch.optim.AdamW(fused=True).

A matrix [R, C] holds the rows of one parameter, or of several one after the other; `rows` are the sampled ones,
ascending.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from est_cli.kernels.upload import upload

CPU_CHUNK_ELEMENTS = 1 << 19
CUDA_CHUNK_ELEMENTS = 1 << 28
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
class Rows:
    """Ascending row indices, on the host and on the device."""

    host: np.ndarray
    device: Tensor


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
    rows: Rows | None
    counts: int | np.ndarray
    hyper: Hyperparameters
    ends: Sequence[int] = ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parameter, self.moment, self.square

    def gradient(self, low: int, high: int) -> Tensor:
        """Rows low … high − 1 of the gradients: [high − low, C]."""
        pieces, end = [], 0
        for piece in self.gradients:
            start, end = end, end + len(piece)
            if start < high and low < end:
                pieces.append(piece[max(low - start, 0) : high - start])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True)
class Part:
    """Rows start … stop − 1 of a move; `sizes` are those of its pieces, which end where a parameter does."""

    move: Move
    start: int
    stop: int
    sizes: list[int]

    @property
    def n_elements(self) -> int:
        return (self.stop - self.start) * self.move.parameter.shape[1]


@torch.no_grad()
def adamw_step(moves: Sequence[Move], clip: Tensor | None, refused: Tensor | None = None) -> None:
    """Move each matrix; clip, a scalar tensor, scales the gradients.

    If `refused`, a scalar float tensor, is 1, nothing moves. The device decides that; the host does not wait.
    """
    together = [_flat(move) for move in moves if isinstance(move.counts, int)]
    together.sort(key=_how)
    chunks = [(how, list(_chunks(list(group)))) for how, group in groupby(together, key=_how)]
    sizes = [sum(part.n_elements for part in chunk) for _, found in chunks for chunk in found]
    scratch = moves[0].parameter.new_empty(max(sizes)) if sizes else None
    for _, found in chunks:
        taken = torch.full((), found[0][0].move.counts, dtype=torch.float32, device=scratch.device)
        for chunk in found:
            _step_chunk(chunk, clip, refused, taken, scratch)
    for move in moves:
        if not isinstance(move.counts, int):
            _step_sampled_rows(move, clip, refused)


def _how(move: Move) -> tuple:
    """What all parts of a chunk have in common."""
    return move.counts, move.hyper.weight_decay


def _flat(move: Move) -> Move:
    """If all rows have a gradient, or none has, elements become rows: a chunk may end in the middle of a long row."""
    if move.rows is not None:
        return move
    width = move.parameter.shape[1]
    flat = (tensor.reshape(-1, 1) for tensor in move.tensors)
    gradients = [gradient.reshape(-1, 1) for gradient in move.gradients]
    return Move(*flat, gradients, None, move.counts, move.hyper, [end * width for end in move.ends])


def _chunks(moves: Sequence[Move]) -> Iterator[list[Part]]:
    """All rows of the moves, in chunks."""
    limit = CUDA_CHUNK_ELEMENTS if moves[0].parameter.is_cuda else CPU_CHUNK_ELEMENTS
    chunk, room = [], limit
    for move in moves:
        columns = move.parameter.shape[1]
        multiple = LANES // math.gcd(LANES, columns)
        height = max(1, limit // columns // multiple) * multiple
        start, sizes = 0, []
        for size in _pieces(move, height):
            if size * columns > room and (chunk or sizes):
                if sizes:
                    chunk.append(Part(move, start, start + sum(sizes), sizes))
                    start, sizes = start + sum(sizes), []
                yield chunk
                chunk, room = [], limit
            sizes.append(size)
            room -= size * columns
        chunk.append(Part(move, start, start + sum(sizes), sizes))
    yield chunk


def _pieces(move: Move, height: int) -> Iterator[int]:
    """Rows at a time: at most `height`. If some parameter ends within a vector register, each ends a piece."""
    n, columns = move.parameter.shape
    ends = move.ends if any(end * columns % LANES for end in move.ends) else [n]
    start = 0
    for end in ends or [n]:
        for first in range(start, end, height):
            yield min(height, end - first)
        start = end


def _step_chunk(
    chunk: Sequence[Part], clip: Tensor | None, refused: Tensor | None, taken: Tensor, scratch: Tensor
) -> None:
    tensors = zip(*([t[part.start : part.stop] for t in part.move.tensors] for part in chunk), strict=True)
    parameters, moments, squares, gradients = (
        [piece for part, tensor in zip(chunk, column, strict=True) for piece in tensor.split(part.sizes)]
        for column in (*tensors, _gradients(chunk, clip, scratch))
    )
    counts, options = [taken] * len(parameters), {"amsgrad": False, "maximize": False, "found_inf": refused}
    torch._fused_adamw_(parameters, gradients, moments, squares, [], counts, **options, **vars(chunk[0].move.hyper))


def _gradients(chunk: Sequence[Part], clip: Tensor | None, scratch: Tensor) -> list[Tensor]:
    """The clipped gradient of every part, 0 in rows that were not sampled; in `scratch` unless one is used as it is."""
    if len(chunk) == 1 and chunk[0].move.gradients and chunk[0].move.rows is None:
        found = chunk[0].move.gradient(chunk[0].start, chunk[0].stop)
        return [found if clip is None else torch.mul(found, clip, out=scratch[: len(found)][:, None])]
    scratch = scratch[: sum(part.n_elements for part in chunk)]
    parts = scratch.split([part.n_elements for part in chunk])
    parts = [out.view(-1, part.move.parameter.shape[1]) for out, part in zip(parts, chunk, strict=True)]
    if any(part.move.rows is not None or not part.move.gradients for part in chunk):
        scratch.zero_()
    whole: list[tuple[Tensor, Tensor]] = []
    for part, out in zip(chunk, parts, strict=True):
        move = part.move
        if not move.gradients:
            continue
        if move.rows is None:
            whole += _matching(out, part)
            continue
        low, high = np.searchsorted(move.rows.host, (part.start, part.stop)).tolist()
        if low < high:
            index = move.rows.device[low:high]
            out.index_copy_(0, index - part.start if part.start else index, move.gradient(low, high))
    if whole:
        torch._foreach_copy_(*map(list, zip(*whole, strict=True)))
    if clip is not None:
        scratch.mul_(clip)
    return parts


def _matching(out: Tensor, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs: a slice of `out`, and the gradient that belongs there."""
    end = 0
    for gradient in part.move.gradients:
        start, end = end, end + len(gradient)
        low, high = max(start, part.start), min(end, part.stop)
        if low < high:
            yield out[low - part.start : high - part.start], gradient[low - start : high - start]


def _step_sampled_rows(move: Move, clip: Tensor | None, refused: Tensor | None) -> None:
    """Move only the sampled rows, each by its own count."""
    hyper, counts = move.hyper, move.counts
    first, second = (
        upload(c, move.parameter.device).to(move.parameter.dtype)[:, None] for c in corrections(hyper, counts)
    )
    limit = CUDA_CHUNK_ELEMENTS if move.parameter.is_cuda else CPU_CHUNK_ELEMENTS
    height = max(1, limit // move.parameter.shape[1])
    for start in range(0, len(counts), height):
        part = slice(start, min(start + height, len(counts)))
        index = part if move.rows is None else move.rows.device[part]
        old = [tensor[index] for tensor in move.tensors]
        p, m, v = (tensor.clone() for tensor in old) if refused is not None or move.rows is None else old
        g = move.gradient(part.start, part.stop)
        g = g if clip is None else g * clip
        p.mul_(1 - hyper.lr * hyper.weight_decay)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        p.addcdiv_(m * (hyper.lr / first[part]), v.sqrt().div_(second[part]).add_(hyper.eps), value=-1)
        for whole, before, moved in zip(move.tensors, old, (p, m, v), strict=True):
            moved = moved if refused is None else torch.where(refused == 1, before, moved)
            if move.rows is None:
                whole[index] = moved
            else:
                whole.index_copy_(0, index, moved)


def corrections(hyper: Hyperparameters, count):
    """1 − β1^t and √(1 − β2^t), for one count or an array of them."""
    return 1 - hyper.beta1**count, (1 - hyper.beta2**count) ** 0.5
