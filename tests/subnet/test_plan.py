"""How much a rate keeps, of what, and what that does to the scales."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import GPT2, LLAMA

from est_cli.config import RescaleConfig, SamplingConfig
from est_cli.subnet.plan import Plan, branch_scales, effective_rates, subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage, StageSpec, keep

TINYLLAMA = replace(LLAMA, n_layers=22, n_heads=32, n_kv_heads=4, d_model=2048, d_ff=5632, head_dim=64)
HALF = Rates(0.5, 0.5, 0.5)
GROUP, QUERY = SamplingConfig(gqa="group"), SamplingConfig(gqa="query")


@pytest.mark.parametrize(
    ("rate", "total", "kept"),
    [(0.5, 4, 2), (0.5, 3, 2), (0.5, 5, 3), (0.3, 4, 1), (0.375, 4, 2), (0.01, 100, 1), (1e-9, 7, 1), (1.0, 7, 7)],
)
def test_keep_rounds_half_up_and_keeps_at_least_one(rate, total, kept):
    assert keep(rate, total) == kept


def test_half_of_gpt2_keeps_half_of_everything():
    gpt2 = replace(GPT2, n_layers=12, n_heads=12, n_kv_heads=12, d_model=768, d_ff=3072, head_dim=64)
    shape = subnetwork(gpt2, GROUP, HALF)
    assert shape.model == replace(gpt2, n_layers=6, n_heads=6, n_kv_heads=6, d_ff=1536)
    assert (shape.head_scale, shape.mlp_scale, shape.scales_layers) == (2.0, 2.0, False)


def test_group_mode_drops_key_value_heads_with_all_their_query_heads():
    shape = subnetwork(TINYLLAMA, GROUP, HALF)
    assert (shape.model.n_heads, shape.model.n_kv_heads) == (16, 2)
    assert shape.head_scale == 2.0


def test_query_mode_keeps_every_key_value_head():
    shape = subnetwork(TINYLLAMA, QUERY, Rates(heads=0.3))
    assert (shape.model.n_heads, shape.model.n_kv_heads) == (8, 4)
    assert shape.head_scale == 4.0


def test_without_shared_key_value_heads_both_modes_sample_heads():
    """MHA is not grouped-query attention with groups of one: query mode would keep every head."""
    assert subnetwork(GPT2, QUERY, HALF) == subnetwork(GPT2, GROUP, HALF)
    stage = Stage(1, 0, 10, HALF)
    plans = [sample(0, 3, stage, GPT2, sampling).as_dict() for sampling in (GROUP, QUERY)]
    assert plans[0] == plans[1]
    assert len(plans[0]["heads"][0]) == 2
    assert plans[0]["heads"] == plans[0]["kv_heads"]


def test_the_scale_is_of_what_was_really_kept():
    """0.4 of three groups is one, 0.3 of 16 neurons five: the scales are 3 and 16/5."""
    shape = subnetwork(LLAMA, GROUP, Rates(0.4, 0.3, 0.5))
    assert (shape.model.n_kv_heads, shape.model.n_heads, shape.model.d_ff, shape.model.n_layers) == (1, 2, 5, 2)
    assert shape.head_scale == 3.0
    assert shape.mlp_scale == 16 / 5


@pytest.mark.parametrize(("block", "d_ff"), [(1, 5), (4, 4), (8, 8), (16, 16)])
def test_blocks_are_counted_whole(block, d_ff):
    shape = subnetwork(LLAMA, SamplingConfig(mlp_block=block), Rates(mlp=0.3))
    assert shape.model.d_ff == d_ff
    assert shape.mlp_scale == 16 / d_ff


def test_layers_are_rescaled_only_where_that_is_asked_for():
    rescaled, layers = SamplingConfig(rescale_layers=True), np.array([0, 2])
    assert not subnetwork(LLAMA, GROUP, HALF).scales_layers
    assert not subnetwork(LLAMA, rescaled, Rates(0.5, 0.5)).scales_layers
    scales = branch_scales(subnetwork(LLAMA, rescaled, Rates(layers=0.5)), rescaled, 3, layers)
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


def test_a_plan_prints_as_plain_lists():
    plan = Plan(np.array([1]), np.array([[0, 2]]), np.array([[0]]), np.array([[3, 4]]), np.array([[2.0, 1.5]]))
    units = {"layers": [1], "heads": [[0, 2]], "kv_heads": [[0]], "neurons": [[3, 4]]}
    assert plan.as_dict() == {**units, "scales": [[2.0, 1.5]]}
