"""Which rows of a fused parameter a plan's units own."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import GPT2, LLAMA

from est_cli.subnet.plan import Plan, n_rows, sampled_rows

PLAN = Plan(
    layers=np.array([0, 2]),
    heads=np.array([[0, 1, 4, 5], [2, 3, 4, 5]]),
    kv_heads=np.array([[0, 2], [1, 2]]),
    neurons=np.array([[1, 3], [0, 15]]),
    scales=np.ones((2, 2)),
)


@pytest.mark.parametrize(
    ("kind", "gpt2", "llama"), [("qkv", 12, 12), ("heads", 4, 6), ("up", 16, 32), ("neurons", 16, 16)]
)
def test_a_parameter_has_a_row_for_every_unit_it_serves(kind, gpt2, llama):
    assert n_rows(kind, GPT2) == gpt2
    assert n_rows(kind, LLAMA) == llama


@pytest.mark.parametrize(
    ("kind", "position", "rows"),
    [
        ("qkv", 0, [0, 1, 4, 5, 6, 8, 9, 11]),  # queries 0-5, keys 6-8, values 9-11
        ("qkv", 1, [2, 3, 4, 5, 7, 8, 10, 11]),
        ("heads", 1, [2, 3, 4, 5]),
        ("up", 0, [1, 3, 17, 19]),  # gate 0-15, up 16-31
        ("up", 1, [0, 15, 16, 31]),
        ("neurons", 1, [0, 15]),
    ],
)
def test_rows_of_a_llama_layer(kind, position, rows):
    assert sampled_rows(kind, LLAMA, PLAN, position).tolist() == rows


def test_an_mlp_without_a_gate_has_one_row_a_neuron():
    assert sampled_rows("up", replace(LLAMA, mlp="gelu"), PLAN, 0).tolist() == [1, 3]


@pytest.mark.parametrize("kind", ["qkv", "heads", "up", "neurons"])
def test_rows_ascend(kind):
    for position in (0, 1):
        assert (np.diff(sampled_rows(kind, LLAMA, PLAN, position)) > 0).all()
