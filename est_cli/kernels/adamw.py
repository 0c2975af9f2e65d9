"""AdamW (Loshchilov and Hutter, 2019) on sampled rows, one pass over what moves.

Clip scale, decay, moments and the scatter of the sampled rows happen chunk by chunk. On a CPU a chunk fits in the
cache; on a GPU it is as large as the memory for its gradients allows. Gradients of a sampled matrix's full size never
exist beyond a chunk. Where rows have taken as many steps, PyTorch's own fused kernel moves all parts of a chunk in one
call, so that the bits are those of torch.optim.AdamW(fused=True).

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
"""Elements of a vector register: the fused kernel rounds what is left over of a tensor otherwise."""


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
    """One matrix's part in an optimizer step.

    parameter, moment, square [R, C]; gradients: matrices [r, C] one after the other, for `rows`, or for all rows where
    that is None; none at all for no gradient. counts is the number of the step, from 1: an int, and then every row
    takes it, with gradient 0 where there is none; or one for each row of the gradients, and then only those rows move.
    `ends` are the rows at which the parameters in the matrix end.
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
    """Each matrix takes its step; clip is the scale of the gradients, a scalar tensor.

    `refused`, a scalar float tensor: where it is 1 nothing moves. The device decides it; the host does not wait.
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
    """Where all rows have a gradient, or none, elements are rows: a chunk may end in the middle of a long row."""
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
    """Rows at a time: at most `height`. A piece ends where a parameter does, if no vector register ends there."""
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
    gradients = _gradients(chunk, clip, scratch)
    pieces = [
        [piece for part, tensor in zip(chunk, tensors, strict=True) for piece in tensor.split(part.sizes)]
        for tensors in (
            *zip(*([t[part.start : part.stop] for t in part.move.tensors] for part in chunk), strict=True),
            gradients,
        )
    ]
    parameters, moments, squares, gradients = pieces
    hyper = chunk[0].move.hyper
    torch._fused_adamw_(
        parameters,
        gradients,
        moments,
        squares,
        [],
        [taken] * len(parameters),
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
        found_inf=refused,
    )


def _gradients(chunk: Sequence[Part], clip: Tensor | None, scratch: Tensor) -> list[Tensor]:
    """The clipped gradient of every part, 0 where a row was not sampled; in `scratch` where it is not given so."""
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
    """Where the gradients of a part go, and they."""
    end = 0
    for gradient in part.move.gradients:
        start, end = end, end + len(gradient)
        low, high = max(start, part.start), min(end, part.stop)
        if low < high:
            yield out[low - part.start : high - part.start], gradient[low - start : high - start]


def _step_sampled_rows(move: Move, clip: Tensor | None, refused: Tensor | None) -> None:
    """Only the sampled rows move: each takes the step that its own count says."""
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
