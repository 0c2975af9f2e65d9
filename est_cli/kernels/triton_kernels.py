"""Triton's versions of the three operations. est_cli.kernels.dispatch imports this file only where a GPU uses it.

Pack and AdamW reach many matrices of different sizes in one launch. A job is the work on one matrix. Its elements are
cut into groups of WIDTH neighbours in a row, its groups into tiles, and the tiles are numbered across all jobs: one
program does one tile. The jobs travel to the GPU as a table of int64 [fields, JOBS], made for every launch: a few
kilobytes, against the megabytes that a launch moves. Three fields are common: the number of a job's first tile, its
groups, and its groups per row. The others are the kernel's own: addresses of matrices, and what else it needs.

Memory limits all three. At 4.3 TB/s (an H200's copy bandwidth) they take, for GPT-2 124M and TinyLlama:

       bytes                                                       ms at full rates   ms in stage 1
pack   4 read and 2 written per element of bf16 slots              0.17, 1.53         0.08, 0.52
adamw  24 per element, and 4 where it has a gradient; zero_grad    0.81, 7.2          0.75, 6.5
       moves every element, freeze the sampled ones                                   0.40, 2.4 (freeze)
loss   2 read and 2 written per bf16 logit, 16384 tokens           0.77, 0.49         0.77, 0.49

The second read of the loss finds the row in the L2 cache: three programs on each of 132 processors hold 40 MB of rows
of 50304. The head's matrix products beside it take 4.8 and 8.2 ms at 790 TFLOP/s.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from est_cli.kernels import linear_cross_entropy as chunked
from est_cli.kernels.adamw import Move, corrections
from est_cli.kernels.pack import upload

WIDTH = 16
"""Neighbours that a group holds where every row allows it: 16-byte accesses need rows that are so aligned."""
TILE = 2048
"""Elements of a tile: 16 a thread."""
THREADS = 128
BLOCK = 8192
"""Logits that a program holds at a time: 16 a thread."""
ROW_THREADS = 512
_NO_JOB = np.iinfo(np.int64).max


def launch(
    kernel: Callable,
    shapes: Sequence[tuple[int, int]],
    addresses: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
    device: torch.device,
    **arguments,
) -> None:
    """Run `kernel` on jobs of [rows, columns] elements, one launch for each width.

    addresses and others: a sequence for each of the kernel's own fields, numbered in this order, with an entry a
    job. Only matrices whose every row starts at a multiple of 16 bytes have groups of WIDTH.
    """
    rows, columns = np.array(shapes, np.int64).T
    addresses, others = np.array(addresses, np.int64), np.array(others, np.int64)
    aligned = (columns % WIDTH == 0) & (addresses % 16 == 0).all(axis=0)
    for width, chosen in ((WIDTH, aligned), (1, ~aligned)):
        if not chosen.any():
            continue
        per_row = columns[chosen] // width
        groups = rows[chosen] * per_row
        tiles = -(-groups * width // TILE)
        jobs = triton.next_power_of_2(len(tiles))
        table = np.full((3 + len(addresses) + len(others), jobs), _NO_JOB)
        table[:, : len(tiles)] = (np.cumsum(tiles) - tiles, groups, per_row, *addresses[:, chosen], *others[:, chosen])
        kernel[(int(tiles.sum()),)](
            upload(table, device), JOBS=jobs, GROUPS=TILE // width, WIDTH=width, num_warps=THREADS // 32, **arguments
        )


@triton.jit
def locate(table, JOBS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's job; and the row [GROUPS, 1], columns [GROUPS, WIDTH] and row width of its elements.

    The row is -1 for groups past the end of the job.
    """
    tile = tl.program_id(0)
    job = tl.sum((tl.load(table + tl.arange(0, JOBS)) <= tile).to(tl.int32), 0) - 1
    first = tl.load(table + job).to(tl.int32)
    groups = tl.load(table + JOBS + job).to(tl.int32)
    per_row = tl.load(table + 2 * JOBS + job).to(tl.int32)
    group = (tile - first) * GROUPS + tl.arange(0, GROUPS)
    row = group // per_row
    columns = (group - row * per_row)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return job, tl.where(group < groups, row, -1)[:, None], columns, per_row * WIDTH


@triton.jit
def field(table, number: tl.constexpr, job, JOBS: tl.constexpr):
    """A field of the kernel's own."""
    return tl.load(table + (3 + number) * JOBS + job)


@triton.jit
def elements(address, dtype: tl.constexpr, row, columns, row_width, WIDTH: tl.constexpr):
    """Pointers to the elements of a matrix that starts at `address`."""
    pointers = address.to(tl.pointer_type(dtype)) + (row.to(tl.int64) * row_width + columns)
    if WIDTH > 1:
        # The launch has checked it: every group starts at a multiple of 16 bytes.
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [16, 16]), [1, WIDTH])
    return pointers


@torch.no_grad()
def gather_rows(sources: Sequence[Tensor], rows: Sequence[Tensor | None], slots: Sequence[Tensor]) -> None:
    """`est_cli.kernels.pack.gather_rows`, where all sources have one type, and all slots."""
    if not slots:
        return
    assert all(s.dtype == sources[0].dtype and s.is_contiguous() for s in sources)
    assert all(s.dtype == slots[0].dtype and s.is_contiguous() for s in slots)
    addresses = [s.data_ptr() for s in sources], [s.data_ptr() for s in slots]
    indices = [0 if r is None else r.data_ptr() for r in rows]
    source, slot = (getattr(tl, str(t[0].dtype).removeprefix("torch.")) for t in (sources, slots))
    launch(_gather_tile, [s.shape for s in slots], addresses, [indices], slots[0].device, SOURCE=source, SLOT=slot)


@triton.jit
def _gather_tile(
    table,
    SOURCE: tl.constexpr,
    SLOT: tl.constexpr,
    JOBS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    job, row, columns, width = locate(table, JOBS, GROUPS, WIDTH)
    inside = row >= 0
    slots = elements(field(table, 1, job, JOBS), SLOT, row, columns, width, WIDTH)
    index = field(table, 2, job, JOBS)
    sampled = inside & (index != 0)
    row = tl.where(sampled, tl.load(index.to(tl.pointer_type(tl.int64)) + row, sampled, other=0), row)
    sources = elements(field(table, 0, job, JOBS), SOURCE, row, columns, width, WIDTH)
    tl.store(slots, tl.load(sources, inside, other=0.0).to(SLOT), inside)


@torch.no_grad()
def adamw_step(moves: Sequence[Move], clip: Tensor | None, refused: Tensor | None = None) -> None:
    """`est_cli.kernels.adamw.adamw_step` in float32, with the betas and eps of the first move.

    One launch; two if some moves have a count for every row.
    """
    for freeze in (False, True):
        own = [move for move in moves if isinstance(move.counts, int) is not freeze]
        if own:
            _step(own, clip, refused, freeze)


def _step(moves: Sequence[Move], clip: Tensor | None, refused: Tensor | None, freeze: bool) -> None:
    gradients = [m.gradient if m.gradients else None for m in moves]
    tensors = [t for m in moves for t in m.tensors] + [g for g in gradients if g is not None]
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    device, hyper = moves[0].parameter.device, moves[0].hyper
    moving = [g if freeze and m.rows is not None else m.parameter for m, g in zip(moves, gradients, strict=True)]
    addresses = [[t.data_ptr() for t in column] for column in zip(*(m.tensors for m in moves), strict=True)]
    addresses.append([0 if g is None else g.data_ptr() for g in gradients])
    indices, starts = _joined([_index(m) for m in moves])
    numbers, number_starts = _joined([_numbers(m) for m in moves])
    index_starts = [-1 if m.rows is None else start for m, start in zip(moves, starts, strict=True)]
    launch(
        _adamw_tile,
        [m.shape for m in moving],
        addresses,
        [index_starts, number_starts],
        device,
        indices=upload(indices, device),
        numbers=upload(numbers, device),
        clip=clip,
        refused=refused,
        new_moment=1 - hyper.beta1,
        beta2=hyper.beta2,
        new_square=1 - hyper.beta2,
        eps=hyper.eps,
        FREEZE=freeze,
    )


def _index(move: Move) -> np.ndarray:
    """freeze: the row of each gradient row. zero_grad: the gradient row of each row, -1 where it has none."""
    if move.rows is None:
        return np.empty(0, np.int32)
    if not isinstance(move.counts, int):
        return move.rows.astype(np.int32)
    inverse = np.full(len(move.parameter), -1, np.int32)
    inverse[move.rows] = np.arange(len(move.rows))
    return inverse


def _numbers(move: Move) -> np.ndarray:
    """The factor that decay leaves of a weight; then lr / (1 − β1^t) and √(1 − β2^t) of every count t."""
    first, second = corrections(move.hyper, move.counts)
    numbers = np.empty(1 + 2 * np.size(first), np.float32)
    numbers[0] = 1 - move.hyper.lr * move.hyper.weight_decay
    numbers[1::2] = move.hyper.lr / first
    numbers[2::2] = second
    return numbers


def _joined(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """All arrays in one, and where each starts."""
    sizes = [len(array) for array in arrays]
    return np.concatenate(arrays), (np.cumsum(sizes) - sizes).tolist()


@triton.jit
def _adamw_tile(
    table,
    indices,
    numbers,
    clip,
    refused,
    new_moment,
    beta2,
    new_square,
    eps,
    FREEZE: tl.constexpr,
    JOBS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    job, row, columns, width = locate(table, JOBS, GROUPS, WIDTH)
    if refused is not None:
        row = tl.where(tl.load(refused) == 0.0, row, -1)
    inside = row >= 0
    gradient = field(table, 3, job, JOBS)
    index_start = field(table, 4, job, JOBS)
    numbers += field(table, 5, job, JOBS)

    sampled = inside & (index_start >= 0)
    other_row = tl.where(sampled, tl.load(indices + index_start + row, sampled, other=0), row)
    gradient_row = row if FREEZE else other_row
    row = other_row if FREEZE else row
    pair = gradient_row if FREEZE else tl.zeros_like(row)
    rate = tl.load(numbers + 1 + 2 * pair, inside, other=0.0)
    root = tl.load(numbers + 2 + 2 * pair, inside, other=1.0)

    has_gradient = inside & (gradient_row >= 0) & (gradient != 0)
    g = tl.load(elements(gradient, tl.float32, gradient_row, columns, width, WIDTH), has_gradient, other=0.0)
    if clip is not None:
        g *= tl.load(clip)
    parameters = elements(field(table, 0, job, JOBS), tl.float32, row, columns, width, WIDTH)
    moments = elements(field(table, 1, job, JOBS), tl.float32, row, columns, width, WIDTH)
    squares = elements(field(table, 2, job, JOBS), tl.float32, row, columns, width, WIDTH)
    p = tl.load(parameters, inside, other=0.0) * tl.load(numbers)
    m = tl.load(moments, inside, other=0.0)
    v = tl.load(squares, inside, other=0.0)
    m += new_moment * (g - m)
    v = beta2 * v + new_square * g * g
    p -= rate * m / (tl.sqrt_rn(v) / root + eps)
    tl.store(parameters, p, inside)
    tl.store(moments, m, inside)
    tl.store(squares, v, inside)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`est_cli.kernels.linear_cross_entropy.linear_cross_entropy`, except in float64."""
    return chunked.linear_cross_entropy(hidden, weight, targets, softmax_gradient_)


def softmax_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """`est_cli.kernels.linear_cross_entropy.SoftmaxGradient`: a program reads a row twice and overwrites it."""
    assert logits.is_contiguous() and logits.dtype != torch.float64
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _softmax_gradient_row[(len(logits),)](
        logits, targets, targets.stride(0), losses, COLUMNS=logits.shape[1], BLOCK=BLOCK, num_warps=ROW_THREADS // 32
    )
    return losses


@triton.jit
def _softmax_gradient_row(logits, targets, target_stride, losses, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * COLUMNS
    target = tl.load(targets + row * target_stride)
    chosen = tl.load(logits + target).to(tl.float32)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, columns < COLUMNS, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    tl.store(losses + row, largest - chosen + tl.log(total))
    for start in range(0, COLUMNS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, columns < COLUMNS, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - largest) / total - (columns == target).to(tl.float32)
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), columns < COLUMNS)
