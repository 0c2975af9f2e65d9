"""A plan is a pure function of its key, pinned by golden values; uniform, of the right size, sorted and unique."""

import json
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
from est_cli.subnet.strategies import STRATEGIES, Draw

STAGES = build_stages([StageSpec(20, 0.5, 0.5, 0.5), StageSpec(70, 0.5, 0.5), StageSpec()], 150)
GROUPED = replace(LLAMA, n_heads=8, n_kv_heads=2)
ALL_HALF = Stage(1, 0, 10**9, Rates(0.5, 0.5, 0.5))
SAMPLING = SamplingConfig()
QUERY = SamplingConfig(gqa="query", mlp_block=4)


def plan_at(step: int, model: ModelConfig = LLAMA, sampling: SamplingConfig = SAMPLING, seed: int = 0) -> Plan:
    return sample(seed, step, stage_at(STAGES, step), model, sampling)


def same(a: Plan, b: Plan) -> bool:
    return a.as_dict() == b.as_dict()


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
    assert plan["layers"] == layers
    assert plan["heads"] == heads
    assert plan["kv_heads"] == kv_heads
    assert plan["neurons"][0] == neurons


def test_a_plan_is_the_same_whatever_was_drawn_before():
    expected = [plan_at(step).as_dict() for step in range(30)]
    np.random.seed(1)
    assert [plan_at(step).as_dict() for step in reversed(range(30))] == expected[::-1]


@pytest.mark.parametrize("gqa", ["group", "query"])
@pytest.mark.parametrize("rates", [Rates(0.5, 0.5, 0.5), Rates(0.3, 0.7, 1.0), Rates(0.01, 0.01, 0.01), Rates()])
@pytest.mark.parametrize("model", [*FAMILIES.values(), GROUPED], ids=["mha", "llama", "grouped"])
def test_plans_are_of_the_right_size_sorted_and_unique(model, rates, gqa):
    sampling = SamplingConfig(gqa=gqa, mlp_block=2)
    small = subnetwork(model, sampling, rates).model
    for step in range(20):
        plan = sample(3, step, Stage(1, 0, 20, rates), model, sampling)
        assert plan.layers.shape == (small.n_layers,)
        assert plan.heads.shape == (small.n_layers, small.n_heads)
        assert plan.kv_heads.shape == (small.n_layers, small.n_kv_heads)
        assert plan.neurons.shape == (small.n_layers, small.d_ff)
        totals = (model.n_layers, model.n_heads, model.n_kv_heads, model.d_ff)
        units = (plan.layers[None], plan.heads, plan.kv_heads, plan.neurons)
        for rows, total in zip(units, totals, strict=True):
            assert (np.diff(rows, axis=1) > 0).all()
            assert rows.min() >= 0
            assert rows.max() < total


def test_a_kept_group_keeps_all_its_query_heads():
    for step in range(20):
        plan = plan_at(step)
        for heads, kv_heads in zip(plan.heads, plan.kv_heads, strict=True):
            assert heads.tolist() == [2 * group + i for group in kv_heads.tolist() for i in range(2)]


def test_query_mode_keeps_every_group_and_draws_in_each_of_them():
    differing = 0
    for step in range(20):
        plan = plan_at(step, GROUPED, QUERY)
        for heads, kv_heads in zip(plan.heads, plan.kv_heads, strict=True):
            assert kv_heads.tolist() == [0, 1]
            assert (heads // 4).tolist() == [0, 0, 1, 1]
            differing += (heads[:2] % 4).tolist() != (heads[2:] % 4).tolist()
    assert differing > 0, "groups draw separately"


@pytest.mark.parametrize("block", [2, 4, 8])
def test_blocks_of_neurons_stay_together(block):
    chosen = set()
    for step in range(30):
        for neurons in plan_at(step, sampling=SamplingConfig(mlp_block=block)).neurons:
            blocks = neurons.reshape(-1, block)
            assert (blocks[:, 0] % block == 0).all()
            assert (blocks == blocks[:, :1] + np.arange(block)).all()
            chosen |= set((blocks[:, 0] // block).tolist())
    assert chosen == set(range(16 // block))


def tallies(model: ModelConfig, sampling: SamplingConfig, draws: int) -> dict[str, np.ndarray]:
    """How often each subset of a dimension was kept, over many steps, in whichever layer came first."""
    found: dict[str, dict] = {"layers": {}, "heads": {}, "neurons": {}}
    for step in range(draws):
        plan = sample(11, step, ALL_HALF, model, sampling)
        for name, units in (("layers", plan.layers), ("heads", plan.heads[0]), ("neurons", plan.neurons[0])):
            subset = tuple(units.tolist())
            found[name][subset] = found[name].get(subset, 0) + 1
    return {name: np.array(list(counts.values())) for name, counts in found.items()}


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
    """Chi-square over whole subsets: stronger than every unit alone, since pairs must not attract either."""
    draws = 3600
    counts = tallies(model, SamplingConfig(gqa=gqa), draws)
    for name, subsets in (("layers", 3), ("heads", head_subsets), ("neurons", 20)):
        assert len(counts[name]) == subsets, name
        assert chisquare(counts[name]).pvalue > 1e-3, (name, counts[name])


def test_plans_of_different_seeds_differ():
    assert len({json.dumps(plan_at(3, seed=seed).as_dict()) for seed in range(20)}) > 15


@pytest.mark.parametrize("every", [1, 3, 6])
def test_a_plan_lasts_resample_every_steps_from_the_start_of_its_stage(every):
    sampling = SamplingConfig(resample_every=every)
    for stage in STAGES[:2]:
        plans = [plan_at(step, sampling=sampling) for step in range(stage.first_step, stage.first_step + 3 * every)]
        for index in range(3):
            assert all(same(plan, plans[index * every]) for plan in plans[index * every : (index + 1) * every])
        assert len({json.dumps(plan.as_dict()) for plan in plans}) == 3


def test_a_new_stage_draws_anew():
    """With a plan that would last for ever, and the same rates in both stages."""
    stages = build_stages([StageSpec(10, 0.5, 0.5, 0.5), StageSpec(None, 0.5, 0.5, 0.5)], 20)
    sampling = SamplingConfig(resample_every=1000)
    plans = [sample(0, step, stage_at(stages, step), LLAMA, sampling) for step in range(20)]
    assert all(same(plan, plans[0]) for plan in plans[:10])
    assert all(same(plan, plans[10]) for plan in plans[10:])
    assert not same(plans[0], plans[10])


def test_the_full_stage_keeps_everything():
    plan = plan_at(100)
    assert plan.layers.tolist() == [0, 1, 2]
    assert (plan.heads == np.arange(6)).all()
    assert (plan.kv_heads == np.arange(3)).all()
    assert (plan.neurons == np.arange(16)).all()


def odd_units(draw: Draw, total: int, kept: int) -> np.ndarray:
    """A strategy of a person's own, unsorted."""
    return np.arange(total - 1, total - 1 - kept, -1)


def test_a_persons_own_strategy_is_called_by_its_dotted_path_and_sorted():
    plan = sample(0, 0, STAGES[0], LLAMA, SamplingConfig(strategy=f"{__name__}.odd_units"))
    assert plan.layers.tolist() == [1, 2]
    assert plan.neurons[0].tolist() == list(range(8, 16))


@pytest.mark.parametrize(
    "strategy",
    [
        lambda draw, total, kept: np.arange(kept - 1),
        lambda draw, total, kept: np.arange(total),
        lambda draw, total, kept: np.zeros(kept, int),
        lambda draw, total, kept: np.arange(kept) - 1,
        lambda draw, total, kept: np.arange(kept) + total - kept + 1,
        lambda draw, total, kept: np.arange(kept)[None],
        lambda draw, total, kept: np.arange(kept) + 0.25,
    ],
    ids=["too few", "too many", "twice the same", "negative", "past the end", "of two dimensions", "fractions"],
)
def test_a_strategy_that_returns_something_else_is_refused(strategy, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "odd", strategy)
    with pytest.raises(UserError, match=r"sampling\.strategy must return 2 different indices below 3"):
        sample(0, 0, STAGES[0], LLAMA, SamplingConfig(strategy="odd"))
