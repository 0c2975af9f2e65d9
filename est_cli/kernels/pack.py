"""Pack: gather the sampled rows of many matrices, casting them to the slots' type."""

from collections.abc import Sequence

import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 1 << 19
CUDA_CHUNK_ELEMENTS = 1 << 28
"""Elements that are gathered before they are cast: on a CPU they stay in the cache between the two."""


@torch.no_grad()
def gather_rows(sources: Sequence[Tensor], rows: Sequence[Tensor | None], slots: Sequence[Tensor]) -> None:
    """slots[i] ← sources[i][rows[i]], or all rows where rows[i] is None.

    sources [R, C], rows [r] of int64, slots [r, C] of any float type.
    """
    whole = [(slot, source) for source, index, slot in zip(sources, rows, slots, strict=True) if index is None]
    if whole:
        torch._foreach_copy_(*map(list, zip(*whole, strict=True)))
    for source, index, slot in zip(sources, rows, slots, strict=True):
        if index is None:
            continue
        if source.dtype == slot.dtype:
            torch.index_select(source, 0, index, out=slot)
            continue
        height = max(1, (CUDA_CHUNK_ELEMENTS if slot.is_cuda else CPU_CHUNK_ELEMENTS) // slot.shape[1])
        for some, part in zip(index.split(height), slot.split(height), strict=True):
            part.copy_(source.index_select(0, some))
