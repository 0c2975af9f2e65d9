"""A model's parameters lie in stacks, and keep their names and values. test_equivalence.py grows them."""

import pytest
import torch
from tiny import FAMILIES, GPT2, random_batch, random_master, snapshot

from est_cli.training.stacks import adjacent, stack_master


@pytest.mark.parametrize("family", FAMILIES)
def test_stacking_changes_no_value_and_no_name(family):
    model, untouched = random_master(FAMILIES[family]), random_master(FAMILIES[family])
    stacks = stack_master(model)
    assert list(snapshot(model)) == list(snapshot(untouched))
    torch.testing.assert_close(snapshot(model), snapshot(untouched), rtol=0, atol=0)
    assert model(*random_batch(model.config)) == untouched(*random_batch(model.config))
    assert sum(stack.matrix.numel() for stack in stacks) == sum(p.numel() for p in model.parameters())
    assert sorted(name for stack in stacks for name in stack.places) == sorted(snapshot(model))


def test_a_stack_and_its_parameters_share_their_memory_and_keep_it():
    model = random_master(GPT2)
    stacks, parameters = stack_master(model), dict(model.named_parameters())
    for stack in stacks:
        stack.matrix.fill_(3.0)
    assert all((parameter == 3.0).all() for parameter in parameters.values())
    again = stack_master(model)
    assert [stack.matrix.data_ptr() for stack in again] == [stack.matrix.data_ptr() for stack in stacks]


def test_pieces_that_follow_one_another_are_one_and_others_stay():
    whole = torch.arange(24.0).view(8, 3)
    (merged,) = adjacent([whole[1:3], whole[3:4], whole[4:8]])
    assert torch.equal(merged, whole[1:]) and merged.data_ptr() == whole[1:].data_ptr()
    for pieces in ([whole[0:1], whole[2:3]], [whole[0:1], torch.zeros(2, 3)], [whole[3:4], whole[0:3]], []):
        assert len(adjacent(pieces)) == len(pieces)
