"""Copies into memory that a step uses: host arrays to the device, and sampled rows into slots of another type."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Elements that pass through several operations in turn: on a CPU they stay in the cache between them."""


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """The array in memory that `device` can copy from without the host. Any thread may call this."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):
        return tensor.pin_memory()


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, through pinned memory: the host does not wait for the device."""
    return pinned(array, device).to(device, non_blocking=True)


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
        height = max(1, CHUNK_ELEMENTS[slot.device.type] // slot.shape[1])
        for some, part in zip(index.split(height), slot.split(height), strict=True):
            part.copy_(source.index_select(0, some))
