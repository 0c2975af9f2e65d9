"""AdamW (Loshchilov and Hutter, 2019) on sampled rows, in one pass over what moves.

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

from est_cli.kernels.pack import upload

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

    def pieces(self, low: int, high: int) -> list[Tensor]:
        """Rows low … high − 1 of the gradients, one after the other."""
        return rows_between(self.gradients, low, high)

    def gradient(self, low: int, high: int) -> Tensor:
        """The same in one matrix [high − low, C]."""
        pieces = self.pieces(low, high)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def rows_between(matrices: Sequence[Tensor], low: int, high: int) -> list[Tensor]:
    """Views of rows low … high − 1 of matrices that lie one below the other."""
    found, end = [], 0
    for matrix in matrices:
        start, end = end, end + len(matrix)
        if start < high and low < end:
            found.append(matrix[max(low - start, 0) : high - start])
    return found


@dataclass
class _Part:
    """The rows of a move that a chunk holds, from `start` on; `sizes` are those of its pieces."""

    move: Move
    start: int
    sizes: list[int]

    @property
    def stop(self) -> int:
        return self.start + sum(self.sizes)

    @property
    def n_elements(self) -> int:
        return sum(self.sizes) * self.move.parameter.shape[1]


@torch.no_grad()
def adamw_step(moves: Sequence[Move], clip: Tensor | None, refused: Tensor | None = None) -> None:
    """Move each matrix; clip, a scalar tensor, scales the gradients.

    If `refused`, a scalar float tensor, is 1, nothing moves. The device decides that; the host does not wait.
    """
    together = sorted((_flat(move) for move in moves if isinstance(move.counts, int)), key=_how)
    chunks = [chunk for _, group in groupby(together, key=_how) for chunk in _chunks(list(group))]
    if chunks:
        scratch = moves[0].parameter.new_empty(max(sum(part.n_elements for part in chunk) for chunk in chunks))
    for chunk in chunks:
        _step_chunk(chunk, clip, refused, scratch)
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


def _chunks(moves: Sequence[Move]) -> Iterator[list[_Part]]:
    """All rows of the moves, in chunks."""
    limit = _chunk_elements(moves[0])
    chunk, room = [], limit
    for move in moves:
        columns = move.parameter.shape[1]
        multiple = LANES // math.gcd(LANES, columns)
        start = 0
        for size in _pieces(move, max(1, limit // columns // multiple) * multiple):
            if size * columns > room and chunk:
                yield chunk
                chunk, room = [], limit
            if not chunk or chunk[-1].move is not move:
                chunk.append(_Part(move, start, []))
            chunk[-1].sizes.append(size)
            start += size
            room -= size * columns
    yield chunk


def _chunk_elements(move: Move) -> int:
    return CUDA_CHUNK_ELEMENTS if move.parameter.is_cuda else CPU_CHUNK_ELEMENTS


def _pieces(move: Move, height: int) -> Iterator[int]:
    """Rows at a time: at most `height`. If some parameter ends within a vector register, each ends a piece."""
    n, columns = move.parameter.shape
    ends = move.ends if any(end * columns % LANES for end in move.ends) else [n]
    start = 0
    for end in ends:
        for first in range(start, end, height):
            yield min(height, end - first)
        start = end


def _step_chunk(chunk: Sequence[_Part], clip: Tensor | None, refused: Tensor | None, scratch: Tensor) -> None:
    tensors = zip(*([t[part.start : part.stop] for t in part.move.tensors] for part in chunk), strict=True)
    parameters, moments, squares, gradients = (
        [piece for part, tensor in zip(chunk, column, strict=True) for piece in tensor.split(part.sizes)]
        for column in (*tensors, _gradients(chunk, clip, scratch))
    )
    count = torch.full((), chunk[0].move.counts, dtype=torch.float32, device=scratch.device)
    options = {"amsgrad": False, "maximize": False, "found_inf": refused, **vars(chunk[0].move.hyper)}
    torch._fused_adamw_(parameters, gradients, moments, squares, [], [count] * len(parameters), **options)


def _gradients(chunk: Sequence[_Part], clip: Tensor | None, scratch: Tensor) -> list[Tensor]:
    """The clipped gradient of every part, 0 in rows that were not sampled; in `scratch` unless one is used as it is."""
    if len(chunk) == 1 and chunk[0].move.gradients and chunk[0].move.rows is None:
        found = chunk[0].move.gradient(chunk[0].start, chunk[0].stop)
        return [found if clip is None else torch.mul(found, clip, out=scratch[: len(found)][:, None])]
    scratch = scratch[: sum(part.n_elements for part in chunk)]
    parts = scratch.split([part.n_elements for part in chunk])
    parts = [out.view(-1, part.move.parameter.shape[1]) for out, part in zip(parts, chunk, strict=True)]
    if any(part.move.rows is not None or not part.move.gradients for part in chunk):
        scratch.zero_()
    whole, targets = [], []
    for part, out in zip(chunk, parts, strict=True):
        move = part.move
        if move.rows is None:
            pieces = move.pieces(part.start, part.stop)
            whole += pieces
            targets += out.split([len(piece) for piece in pieces]) if pieces else []
            continue
        low, high = np.searchsorted(move.rows.host, (part.start, part.stop)).tolist()
        if low < high:
            index = move.rows.device[low:high]
            out.index_copy_(0, index - part.start if part.start else index, move.gradient(low, high))
    if whole:
        torch._foreach_copy_(targets, whole)
    if clip is not None:
        scratch.mul_(clip)
    return parts


def _step_sampled_rows(move: Move, clip: Tensor | None, refused: Tensor | None) -> None:
    """Move only the sampled rows, each by its own count."""
    hyper, counts = move.hyper, move.counts
    first, second = (
        upload(c, move.parameter.device).to(move.parameter.dtype)[:, None] for c in corrections(hyper, counts)
    )
    height = max(1, _chunk_elements(move) // move.parameter.shape[1])
    for start in range(0, len(counts), height):
        part = slice(start, min(start + height, len(counts)))
        index = move.rows.device[part] if move.rows else torch.arange(part.start, part.stop, device=first.device)
        old = [tensor[index] for tensor in move.tensors]
        p, m, v = old if refused is None else (tensor.clone() for tensor in old)
        g = move.gradient(part.start, part.stop)
        g = g if clip is None else g * clip
        p.mul_(1 - hyper.lr * hyper.weight_decay)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        p.addcdiv_(m * (hyper.lr / first[part]), v.sqrt().div_(second[part]).add_(hyper.eps), value=-1)
        for whole, before, moved in zip(move.tensors, old, (p, m, v), strict=True):
            whole.index_copy_(0, index, moved if refused is None else torch.where(refused == 1, before, moved))


def corrections(hyper: Hyperparameters, count):
    """1 − β1^t and √(1 − β2^t), for one count or an array of them."""
    return 1 - hyper.beta1**count, (1 - hyper.beta2**count) ** 0.5
