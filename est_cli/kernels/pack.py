"""Pack: gather the sampled rows of many matrices, casting them to the slots' type."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gather_rows(sources: Sequence[Tensor], rows: Sequence[Tensor | None], slots: Sequence[Tensor]) -> None:
    """slots[i] ← sources[i][rows[i]], or all rows where rows[i] is None.

    sources [R, C], rows [r] of int64, slots [r, C] of any float type.
    """
    for source, index, slot in zip(sources, rows, slots, strict=True):
        if index is None:
            slot.copy_(source)
        elif source.dtype == slot.dtype:
            torch.index_select(source, 0, index, out=slot)
        else:
            slot.copy_(source.index_select(0, index))
