"""How much a rate keeps, of what; what that does to the scales; and which rows of a fused parameter a plan owns."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import GPT2, GPT2_BASE, LLAMA, TINYLLAMA

from est_cli.config import RescaleConfig, SamplingConfig
from est_cli.subnet.plan import Plan, branch_scales, effective_rates, n_rows, sampled_rows, subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage, StageSpec, keep

HALF = Rates(0.5, 0.5, 0.5)
GROUP, QUERY = SamplingConfig(gqa="group"), SamplingConfig(gqa="query")


@pytest.mark.parametrize(
    ("rate", "total", "kept"),
    [(0.5, 4, 2), (0.5, 3, 2), (0.5, 5, 3), (0.3, 4, 1), (0.375, 4, 2), (0.01, 100, 1), (1e-9, 7, 1), (1.0, 7, 7)],
)
def test_keep_rounds_half_up_and_keeps_at_least_one(rate, total, kept):
    assert keep(rate, total) == kept


@pytest.mark.parametrize(
    ("model", "sampling", "rates", "layers", "heads", "kv_heads", "neurons"),
    [
        (GPT2_BASE, GROUP, HALF, 6, 6, 6, 1536),
        (TINYLLAMA, GROUP, HALF, 11, 16, 2, 2816),  # key/value heads go with all their query heads
        (TINYLLAMA, QUERY, Rates(heads=0.3), 22, 8, 4, 5632),  # every key/value head stays
        (LLAMA, GROUP, Rates(0.4, 0.3, 0.5), 2, 2, 1, 5),  # 0.4 of three groups is one, 0.3 of 16 neurons five
        (LLAMA, SamplingConfig(mlp_block=4), Rates(mlp=0.3), 3, 6, 3, 4),  # whole blocks of neurons
        (LLAMA, SamplingConfig(mlp_block=8), Rates(mlp=0.3), 3, 6, 3, 8),
        (LLAMA, SamplingConfig(mlp_block=16), Rates(mlp=0.3), 3, 6, 3, 16),
    ],
)
def test_counts_and_the_scale_of_what_was_really_kept(model, sampling, rates, layers, heads, kv_heads, neurons):
    shape = subnetwork(model, sampling, rates)
    assert shape.model == replace(model, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, d_ff=neurons)
    assert (shape.head_scale, shape.mlp_scale) == (model.n_heads / heads, model.d_ff / neurons)
    assert not shape.scales_layers


def test_without_shared_key_value_heads_both_modes_sample_heads():
    """MHA is not grouped-query attention with groups of one: query mode would keep every head."""
    assert subnetwork(GPT2, QUERY, HALF) == subnetwork(GPT2, GROUP, HALF)
    plans = [sample(0, 3, Stage(1, 0, 10, HALF), GPT2, sampling).as_dict() for sampling in (GROUP, QUERY)]
    assert plans[0] == plans[1]
    assert len(plans[0]["heads"][0]) == 2
    assert plans[0]["heads"] == plans[0]["kv_heads"]


def test_layers_are_rescaled_only_where_that_is_asked_for():
    rescaled = SamplingConfig(rescale_layers=True)
    assert not subnetwork(LLAMA, rescaled, Rates(0.5, 0.5)).scales_layers, "every layer is kept"
    scales = branch_scales(subnetwork(LLAMA, rescaled, Rates(layers=0.5)), rescaled, 3, np.array([0, 2]))
    assert scales.tolist() == [[3 / 2, 3 / 2]] * 2


@pytest.mark.parametrize(("mode", "scale"), [("none", 1.0), ("sqrt", 1.5**0.5), ("inverse", 1.5)])
def test_heads_neurons_and_layers_are_scaled_each_in_its_own_way(mode, scale):
    """Of 3 key/value groups and 3 layers 2 are kept, of 16 neurons 8."""
    paper = branch_scales(subnetwork(LLAMA, GROUP, HALF), GROUP, 3, np.array([0, 1]))
    assert paper.tolist() == [[1.5, 2.0]] * 2
    sampling = SamplingConfig(rescale=RescaleConfig(heads="none", mlp="sqrt", layers=mode))
    scales = branch_scales(subnetwork(LLAMA, sampling, HALF), sampling, 3, np.array([0, 1]))
    np.testing.assert_allclose(scales, [[scale, 2**0.5 * scale]] * 2, rtol=1e-15)


def test_layers_that_are_dropped_by_depth_are_scaled_by_their_own_probability():
    """6 of 8 layers: layer l is kept with probability 1 − 0.5·l/7."""
    sampling = SamplingConfig(layer_strategy="increasing", rescale=RescaleConfig(layers="inverse"))
    model, layers = replace(GPT2, n_layers=8), np.array([0, 1, 2, 4, 6, 7])
    scales = branch_scales(subnetwork(model, sampling, Rates(layers=0.75)), sampling, 8, layers)
    np.testing.assert_allclose(scales, [[1 / (1 - 0.5 * layer / 7)] * 2 for layer in layers], rtol=1e-15)


@pytest.mark.parametrize("rates", [Rates(), Rates(0.9, 0.99, 0.9)])
def test_full_means_that_every_count_is_full(rates):
    """Rates that round to everything are the full model: same shape, no scale."""
    shape = subnetwork(LLAMA, SamplingConfig(rescale_layers=True), rates)
    assert shape.model == LLAMA
    assert not shape.is_scaled


def test_effective_rates_are_the_fractions_after_rounding():
    assert effective_rates(LLAMA, GROUP, StageSpec(None, 0.5, 0.3, 0.5)) == Rates(2 / 3, 5 / 16, 2 / 3)
    assert effective_rates(TINYLLAMA, QUERY, StageSpec(None, 0.3, 0.3, 0.3)) == Rates(8 / 32, 1690 / 5632, 7 / 22)


PLAN = Plan(
    layers=np.array([0, 2]),
    heads=np.array([[0, 1, 4, 5], [2, 3, 4, 5]]),
    kv_heads=np.array([[0, 2], [1, 2]]),
    neurons=np.array([[1, 3], [0, 15]]),
    scales=np.ones((2, 2)),
)


def test_a_plan_prints_as_plain_lists():
    assert {key: value[0] for key, value in PLAN.as_dict().items()} == {
        "layers": 0, "heads": [0, 1, 4, 5], "kv_heads": [0, 2], "neurons": [1, 3], "scales": [1.0, 1.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "gpt2", "llama"), [("qkv", 12, 12), ("heads", 4, 6), ("up", 16, 32), ("neurons", 16, 16)]
)
def test_a_parameter_has_a_row_for_every_unit_it_serves(kind, gpt2, llama):
    assert (n_rows(kind, GPT2), n_rows(kind, LLAMA)) == (gpt2, llama)


@pytest.mark.parametrize(
    ("kind", "mlp", "position", "rows"),
    [
        ("qkv", "swiglu", 0, [0, 1, 4, 5, 6, 8, 9, 11]),  # queries 0-5, keys 6-8, values 9-11
        ("qkv", "swiglu", 1, [2, 3, 4, 5, 7, 8, 10, 11]),
        ("heads", "swiglu", 1, [2, 3, 4, 5]),
        ("up", "swiglu", 0, [1, 3, 17, 19]),  # gate 0-15, up 16-31
        ("up", "swiglu", 1, [0, 15, 16, 31]),
        ("up", "gelu", 0, [1, 3]),
        ("neurons", "swiglu", 1, [0, 15]),
    ],
)
def test_a_plan_owns_these_rows_in_ascending_order(kind, mlp, position, rows):
    assert sampled_rows(kind, replace(LLAMA, mlp=mlp), PLAN, position).tolist() == rows == sorted(rows)
