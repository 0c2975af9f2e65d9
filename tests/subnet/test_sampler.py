"""A plan is a pure function of its key, pinned by golden values; uniform, sorted, and of the right size."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny import FAMILIES, GPT2, LLAMA

from est_cli.config import ModelConfig, SamplingConfig
from est_cli.errors import UserError
from est_cli.subnet.plan import Plan, subnetwork
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
def test_plans_have_the_right_size_and_consist_of_whole_groups_and_blocks(model, rates, gqa):
    sampling = SamplingConfig(gqa=gqa, mlp_block=4)
    small, group = subnetwork(model, sampling, rates).model, model.n_heads // model.n_kv_heads
    for step in range(20):
        plan = sample(3, step, Stage(1, 0, 20, rates), model, sampling)
        for rows, kept, total in (
            (plan.layers[None], (1, small.n_layers), model.n_layers),
            (plan.heads, (small.n_layers, small.n_heads), model.n_heads),
            (plan.kv_heads, (small.n_layers, small.n_kv_heads), model.n_kv_heads),
            (plan.neurons, (small.n_layers, small.d_ff), model.d_ff),
        ):
            assert rows.shape == kept
            assert (np.diff(rows, axis=1) > 0).all(), "sorted and unique"
            assert 0 <= rows.min() <= rows.max() < total
        of_groups = np.repeat(plan.kv_heads, small.n_heads // small.n_kv_heads, axis=1)
        assert (plan.heads // group == of_groups).all(), "group: all heads of a kept group; query: some of every group"
        blocks = plan.neurons.reshape(-1, 4)
        assert (blocks == blocks[:, :1] // 4 * 4 + np.arange(4)).all()


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
def test_a_plan_lasts_resample_every_steps_from_the_start_of_its_stage_and_a_new_stage_draws_again(every):
    stages = build_stages([StageSpec(20, 0.5, 0.5, 0.5), StageSpec(None, 0.5, 0.5, 0.5)], 60)
    sampling, seen = SamplingConfig(resample_every=every), set()
    for stage in stages:
        steps = range(stage.first_step, stage.first_step + 3 * every)
        plans = [text(sample(0, step, stage, LLAMA, sampling)) for step in steps]
        assert plans == [plan for plan in plans[::every] for _ in range(every)]
        seen |= set(plans)
    assert len(seen) == 6, "three of each stage"


@pytest.mark.parametrize(
    "chosen",
    [[0], [0, 1, 2], [0, 0], [-1, 0], [2, 3], [[0, 1]], [0.25, 1.25]],
    ids=["too few", "too many", "twice the same", "negative", "past the end", "two dimensions", "fractions"],
)
def test_a_strategy_that_returns_something_else_is_refused(chosen, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "odd", lambda draw, total, kept: np.array(chosen))
    with pytest.raises(UserError, match=r"sampling\.strategy must return 2 different indices below 3"):
        sample(0, 0, STAGES[0], LLAMA, SamplingConfig(strategy="odd"))
