"""How much a rate keeps, of what; what that does to the scales; and which rows of a fused parameter a plan owns."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import GPT2, LLAMA

from est_cli.benchmark.case import PRESETS
from est_cli.config import RescaleConfig, SamplingConfig
from est_cli.subnet.plan import Plan, Subnetwork, branch_scales, effective_rates, n_rows, sampled_rows, subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage, StageSpec, keep

HALF, TINYLLAMA = Rates(0.5, 0.5, 0.5), PRESETS["tinyllama"]
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
        (PRESETS["gpt2"], GROUP, HALF, 6, 6, 6, 1536),
        (TINYLLAMA, GROUP, HALF, 11, 16, 2, 2816),  # key/value heads go with all their query heads
        (TINYLLAMA, QUERY, Rates(heads=0.3), 22, 8, 4, 5632),  # every key/value head stays
        (LLAMA, GROUP, Rates(0.4, 0.3, 0.5), 2, 2, 1, 5),  # 0.4 of three groups is one, 0.3 of 16 neurons five
        (LLAMA, SamplingConfig(mlp_block=8), Rates(mlp=0.3), 3, 6, 3, 8),  # whole blocks of neurons
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


EIGHT = replace(GPT2, n_layers=8)
BY_DEPTH = SamplingConfig(layer_strategy="increasing", rescale=RescaleConfig(layers="inverse"))
MODES = {mode: SamplingConfig(rescale=RescaleConfig("none", "sqrt", mode)) for mode in ("none", "sqrt", "inverse")}


@pytest.mark.parametrize(
    ("model", "sampling", "rates", "layers", "scales"),
    [
        (LLAMA, GROUP, HALF, [0, 1], [[1.5, 2.0]] * 2),  # the paper: 2 of 3 key/value groups, 8 of 16 neurons
        (LLAMA, SamplingConfig(rescale_layers=True), Rates(layers=0.5), [0, 2], [[3 / 2, 3 / 2]] * 2),
        (LLAMA, MODES["none"], HALF, [0, 1], [[1.0, 2**0.5]] * 2),
        (LLAMA, MODES["sqrt"], HALF, [0, 1], [[1.5**0.5, 3**0.5]] * 2),
        (LLAMA, MODES["inverse"], HALF, [0, 1], [[1.5, 1.5 * 2**0.5]] * 2),
        # Layer l of 8 is kept with probability 1 − 0.5·l/7 where 6 are.
        (EIGHT, BY_DEPTH, Rates(layers=0.75), [0, 1, 2, 4, 6, 7], [[1 / (1 - i / 14)] * 2 for i in (0, 1, 2, 4, 6, 7)]),
    ],
)
def test_heads_neurons_and_layers_are_scaled_each_in_its_own_way(model, sampling, rates, layers, scales):
    found = branch_scales(subnetwork(model, sampling, rates), sampling, model.n_layers, np.array(layers))
    np.testing.assert_allclose(found, scales, rtol=1e-15)


def test_rates_that_round_to_everything_are_the_full_model_of_the_same_shape_without_a_scale():
    sampling = SamplingConfig(rescale_layers=True)
    for rates in (Rates(), Rates(0.9, 0.99, 0.9)):
        assert subnetwork(LLAMA, sampling, rates) == Subnetwork(LLAMA)
    assert not Subnetwork(LLAMA).is_scaled
    assert not subnetwork(LLAMA, sampling, Rates(0.5, 0.5)).scales_layers


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


@pytest.mark.parametrize(
    ("kind", "mlp", "position", "rows", "total"),
    [
        ("qkv", "swiglu", 0, [0, 1, 4, 5, 6, 8, 9, 11], 12),  # queries 0-5, keys 6-8, values 9-11
        ("qkv", "swiglu", 1, [2, 3, 4, 5, 7, 8, 10, 11], 12),
        ("heads", "swiglu", 1, [2, 3, 4, 5], 6),
        ("up", "swiglu", 0, [1, 3, 17, 19], 32),  # gate 0-15, up 16-31
        ("up", "swiglu", 1, [0, 15, 16, 31], 32),
        ("up", "gelu", 0, [1, 3], 16),
        ("neurons", "swiglu", 1, [0, 15], 16),
    ],
)
def test_a_plan_owns_these_of_a_parameters_rows_in_ascending_order(kind, mlp, position, rows, total):
    model = replace(LLAMA, mlp=mlp)
    assert sampled_rows(kind, model, PLAN, position).tolist() == rows == sorted(rows)
    assert n_rows(kind, model) == total
