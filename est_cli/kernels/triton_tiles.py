"""One launch over the elements of many matrices of different sizes.

A job is what one matrix needs. Its elements are cut into groups of WIDTH neighbours in a row, its groups into
tiles, and the tiles are numbered through all jobs: one program, one tile. The jobs travel to the GPU as a table
of int64 [fields, JOBS], made anew for every launch: a few kilobytes, against the megabytes that a launch moves.

Three fields are common: the number of a job's first tile, its groups, and its groups per row. The kernel's own
are addresses of matrices, so that one launch can reach any number of tensors, and whatever else it needs.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from est_cli.kernels.upload import upload

WIDTH = 16
"""Neighbours that a group holds where every row allows it: 16-byte accesses need rows that are so aligned."""
TILE = 2048
"""Elements of a tile: 16 a thread."""
THREADS = 128
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
