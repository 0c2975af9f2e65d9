"""Gathering rows into slots."""

import pytest
import torch

from est_cli.kernels.pack import gather_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slots_hold_the_rows_in_the_slots_type_and_no_graph(dtype):
    sources = [torch.randn(shape, requires_grad=True) for shape in ((7, 5), (4, 1), (3, 9), (2, 3))]
    rows = [torch.tensor([1, 2, 6]), torch.tensor([0, 1, 2, 3]), torch.tensor([2]), None]
    expected = [source if index is None else source[index] for source, index in zip(sources, rows, strict=True)]
    slots = [torch.full(wanted.shape, torch.nan, dtype=dtype) for wanted in expected]
    addresses = [slot.data_ptr() for slot in slots]
    gather_rows(sources, rows, slots)
    for slot, wanted in zip(slots, expected, strict=True):
        assert torch.equal(slot, wanted.to(dtype))
        assert not slot.requires_grad
    assert [slot.data_ptr() for slot in slots] == addresses, "slots are filled, not replaced"
