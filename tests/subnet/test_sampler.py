"""A plan is a pure function of its key, pinned by golden values; uniform, of the right size, sorted and unique."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny import FAMILIES, GPT2, LLAMA

from est_cli.config import ModelConfig, SamplingConfig
from est_cli.errors import UserError
from est_cli.subnet.plan import Plan, subnetwork, whole_plan
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage, StageSpec, build_stages, stage_at
from est_cli.subnet.strategies import STRATEGIES

STAGES = build_stages([StageSpec(20, 0.5, 0.5, 0.5), StageSpec(70, 0.5, 0.5), StageSpec()], 150)
GROUPED = replace(LLAMA, n_heads=8, n_kv_heads=2)
SAMPLING = SamplingConfig()
QUERY = SamplingConfig(gqa="query", mlp_block=4)


def plan_at(step: int, model: ModelConfig = LLAMA, sampling: SamplingConfig = SAMPLING, seed: int = 0) -> Plan:
    return sample(seed, step, stage_at(STAGES, step), model, sampling)


def text(plan: Plan) -> str:
    """Equal for equal plans."""
    return json.dumps(plan.as_dict())


@pytest.mark.parametrize(
    ("seed", "step", "model", "sampling", "layers", "heads", "kv_heads", "neurons"),
    [
        (0, 0, GPT2, SAMPLING, [0, 1], [[0, 2], [2, 3]], [[0, 2], [2, 3]], [2, 4, 6, 7, 8, 12, 14, 15]),
        (0, 19, LLAMA, SAMPLING, [1, 2], [[0, 1, 4, 5]] * 2, [[0, 2]] * 2, [2, 4, 5, 7, 9, 11, 12, 14]),
        (42, 5, GROUPED, QUERY, [1, 2], [[0, 3, 5, 6], [1, 3, 4, 7]], [[0, 1]] * 2, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_plans_are_pinned(seed, step, model, sampling, layers, heads, kv_heads, neurons):
    plan = plan_at(step, model, sampling, seed).as_dict()
    assert (plan["layers"], plan["heads"], plan["kv_heads"]) == (layers, heads, kv_heads)
    assert plan["neurons"][0] == neurons


def test_a_plan_depends_on_the_seed_and_on_nothing_that_was_drawn_before():
    expected = [text(plan_at(step)) for step in range(30)]
    np.random.seed(1)
    assert [text(plan_at(step)) for step in reversed(range(30))] == expected[::-1]
    assert len({text(plan_at(3, seed=seed)) for seed in range(20)}) > 15


@pytest.mark.parametrize("gqa", ["group", "query"])
@pytest.mark.parametrize("rates", [Rates(0.5, 0.5, 0.5), Rates(0.3, 0.7, 1.0), Rates(0.01, 0.01, 0.01), Rates()])
@pytest.mark.parametrize("model", [*FAMILIES.values(), GROUPED], ids=["mha", "llama", "grouped"])
def test_plans_are_of_the_right_size_sorted_and_unique(model, rates, gqa):
    sampling = SamplingConfig(gqa=gqa, mlp_block=2)
    small = subnetwork(model, sampling, rates).model
    for step in range(20):
        plan = sample(3, step, Stage(1, 0, 20, rates), model, sampling)
        for rows, kept, total in (
            (plan.layers[None], (1, small.n_layers), model.n_layers),
            (plan.heads, (small.n_layers, small.n_heads), model.n_heads),
            (plan.kv_heads, (small.n_layers, small.n_kv_heads), model.n_kv_heads),
            (plan.neurons, (small.n_layers, small.d_ff), model.d_ff),
        ):
            assert rows.shape == kept
            assert (np.diff(rows, axis=1) > 0).all()
            assert 0 <= rows.min() <= rows.max() < total


def test_a_kept_group_keeps_all_its_query_heads():
    for step in range(20):
        plan = plan_at(step)
        assert plan.heads.tolist() == [[2 * group + i for group in kept for i in range(2)] for kept in plan.kv_heads]


def test_query_mode_keeps_every_group_and_draws_in_each_of_them():
    plans = [plan_at(step, GROUPED, QUERY) for step in range(20)]
    heads = np.concatenate([plan.heads for plan in plans])
    assert all(plan.kv_heads.tolist() == [[0, 1]] * 2 for plan in plans)
    assert (heads // 4 == [0, 0, 1, 1]).all()
    assert (heads[:, :2] % 4 != heads[:, 2:] % 4).any(), "groups draw separately"


@pytest.mark.parametrize("block", [2, 4, 8])
def test_blocks_of_neurons_stay_together(block):
    plans = [plan_at(step, sampling=SamplingConfig(mlp_block=block)) for step in range(30)]
    blocks = np.concatenate([plan.neurons.reshape(-1, block) for plan in plans])
    assert (blocks == blocks[:, :1] + np.arange(block)).all()
    assert set(blocks[:, 0].tolist()) == set(range(0, 16, block))


@pytest.mark.parametrize(
    ("model", "gqa", "head_subsets"),
    [
        (replace(GPT2, d_ff=6), "group", 6),  # 2 of 4 heads
        (replace(LLAMA, n_heads=8, n_kv_heads=4, d_ff=6), "group", 6),  # 2 of 4 groups
        (replace(LLAMA, n_heads=8, n_kv_heads=2, d_ff=6), "query", 36),  # 2 of 4 heads, in each of 2 groups
    ],
    ids=["heads", "groups", "query-heads"],
)
def test_every_subset_is_equally_likely(model, gqa, head_subsets):
    """Chi-square over whole subsets: stronger than every unit by itself, since pairs must not attract either."""
    stage = Stage(1, 0, 10**9, Rates(0.5, 0.5, 0.5))
    plans = [sample(11, step, stage, model, SamplingConfig(gqa=gqa)) for step in range(1800)]
    for subsets, units in (
        (3, [plan.layers for plan in plans]),
        (head_subsets, [plan.heads[0] for plan in plans]),
        (20, [plan.neurons[0] for plan in plans]),
    ):
        counts = list(Counter(tuple(chosen.tolist()) for chosen in units).values())
        assert len(counts) == subsets
        assert chisquare(counts).pvalue > 1e-3, counts


@pytest.mark.parametrize("every", [1, 3, 6])
def test_a_plan_lasts_resample_every_steps_from_the_start_of_its_stage(every):
    for stage in STAGES[:2]:
        steps = range(stage.first_step, stage.first_step + 3 * every)
        plans = [text(plan_at(step, sampling=SamplingConfig(resample_every=every))) for step in steps]
        assert plans == [plan for plan in plans[::every] for _ in range(every)]
        assert len(set(plans)) == 3


def test_a_new_stage_draws_anew():
    """With a plan that would last for ever, and the same rates in both stages."""
    stages = build_stages([StageSpec(10, 0.5, 0.5, 0.5), StageSpec(None, 0.5, 0.5, 0.5)], 20)
    sampling = SamplingConfig(resample_every=1000)
    plans = [text(sample(0, step, stage_at(stages, step), LLAMA, sampling)) for step in range(20)]
    assert plans == [plans[0]] * 10 + [plans[10]] * 10
    assert plans[0] != plans[10]


def test_the_full_stage_keeps_everything():
    assert text(plan_at(100)) == text(whole_plan(LLAMA))


@pytest.mark.parametrize(
    "chosen",
    [[0], [0, 1, 2], [0, 0], [-1, 0], [2, 3], [[0, 1]], [0.25, 1.25]],
    ids=["too few", "too many", "twice the same", "negative", "past the end", "of two dimensions", "fractions"],
)
def test_a_strategy_that_returns_something_else_is_refused(chosen, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "odd", lambda draw, total, kept: np.array(chosen))
    with pytest.raises(UserError, match=r"sampling\.strategy must return 2 different indices below 3"):
        sample(0, 0, STAGES[0], LLAMA, SamplingConfig(strategy="odd"))
