"""Gathering rows into slots."""

import pytest
import torch

from est_cli.kernels.pack import gather_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slots_hold_the_rows_in_the_slots_type(dtype):
    sources = [torch.randn(7, 5), torch.randn(4, 1), torch.randn(3, 9)]
    rows = [torch.tensor([1, 2, 6]), torch.tensor([0, 1, 2, 3]), torch.tensor([2])]
    slots = [
        torch.full((len(index), source.shape[1]), torch.nan, dtype=dtype)
        for source, index in zip(sources, rows, strict=True)
    ]
    addresses = [slot.data_ptr() for slot in slots]
    gather_rows(sources, rows, slots)
    for source, index, slot in zip(sources, rows, slots, strict=True):
        assert torch.equal(slot, source[index].to(dtype))
    assert [slot.data_ptr() for slot in slots] == addresses, "slots are filled, not replaced"


def test_a_slot_that_is_seen_through_a_view_is_filled():
    weight, slot = torch.arange(24.0), torch.zeros(8)
    gather_rows([weight.view(6, 4)], [torch.tensor([0, 5])], [slot.view(2, 4)])
    assert slot.tolist() == [0, 1, 2, 3, 20, 21, 22, 23]


def test_sources_that_train_are_read_without_a_graph():
    source = torch.randn(4, 2, requires_grad=True)
    slot = torch.zeros(2, 2)
    gather_rows([source], [torch.tensor([0, 3])], [slot])
    assert not slot.requires_grad
