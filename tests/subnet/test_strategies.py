"""Strategies, and the random words that they choose by."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny import LLAMA

from est_cli.config import SamplingConfig
from est_cli.errors import UserError
from est_cli.subnet.sampler import sample, strategy_named
from est_cli.subnet.schedule import Rates, Stage
from est_cli.subnet.strategies import Draw, balanced, cyclic, prefix, random

DRAW = Draw(seed=1, stage_start=10, number=0, layer=2, dimension="heads", group=1)
GROUPED = replace(LLAMA, n_heads=8, n_kv_heads=2)


def test_words_are_pinned():
    first = Draw(seed=0, stage_start=0, number=0, layer=0, dimension="heads")
    assert first.words(4).tolist() == [0x2F4BA6408E4D89B, 0x3DD62B0B9CA8C5B2, 0x1C8667A55D902E79, 0x907D7A052FD5B4DC]
    last = Draw(seed=2**63 - 1, stage_start=20000, number=12345, layer=7, dimension="mlp", group=3)
    assert last.words(3).tolist() == [0x2A57AC09B2A1B2F3, 0x2BD18DD37E857B64, 0xBA0896271CEF653C]


def test_words_come_from_no_global_generator():
    expected = DRAW.words(5).tolist()
    np.random.seed(0)
    assert DRAW.words(5).tolist() == expected
    assert DRAW.words(9).tolist()[:5] == expected, "how many are asked for does not change them"


def test_layers_steps_seeds_stages_and_dimensions_draw_independently():
    """Two draws whose keys differ in one part alone agree no more often than chance: once in six."""
    other = {"seed": 2, "stage_start": 11, "layer": 3, "dimension": "mlp", "group": 2}
    draws = 1200
    for part, value in other.items():
        pairs = [(replace(DRAW, number=n), replace(DRAW, number=n, **{part: value})) for n in range(draws)]
        agree = sum(set(random(a, 4, 2)) == set(random(b, 4, 2)) for a, b in pairs)
        assert chisquare([agree, draws - agree], [draws / 6, draws * 5 / 6]).pvalue > 1e-3, (part, agree)
    following = sum(
        set(random(replace(DRAW, number=n), 4, 2)) == set(random(replace(DRAW, number=n + 1), 4, 2))
        for n in range(draws)
    )
    assert chisquare([following, draws - following], [draws / 6, draws * 5 / 6]).pvalue > 1e-3


def test_random_takes_the_ranks_of_the_words():
    words = DRAW.words(8).tolist()
    assert sorted(random(DRAW, 8, 3).tolist()) == sorted(sorted(range(8), key=words.__getitem__)[:3])


@pytest.mark.parametrize("gqa", ["group", "query"])
def test_prefix_keeps_the_first_units_so_that_smaller_networks_are_nested_in_larger_ones(gqa):
    plans = [
        sample(0, step, Stage(1, 0, 10, Rates(rate, rate, rate)), GROUPED, SamplingConfig(gqa=gqa), prefix)
        for rate, step in ((0.25, 3), (0.5, 8))
    ]
    small, large = plans
    assert large.layers.tolist() == [0, 1]
    assert large.heads[0].tolist() == ([0, 1, 2, 3] if gqa == "group" else [0, 1, 4, 5])
    assert large.neurons[0].tolist() == list(range(8))
    assert set(small.heads[0]) <= set(large.heads[0])
    assert set(small.neurons[0]) <= set(large.neurons[0])


def test_a_misspelt_strategy_is_met_with_the_nearest_one():
    with pytest.raises(UserError, match=r"sampling\.strategy=randm: must be one of .*balanced, cyclic.*mean 'random'"):
        strategy_named("randm")


@pytest.mark.parametrize("path", ["no_such_module.strategy", "est_cli.subnet.sampler.no_such_name"])
def test_a_dotted_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(UserError, match=r"sampling\.strategy=.*cannot be imported"):
        strategy_named(path)


HALVES, SIZES = Rates(0.5, 0.5, 0.5), replace(LLAMA, n_layers=4, n_heads=4, n_kv_heads=4, d_ff=16)
IN_TURN = pytest.mark.parametrize("strategy", [balanced, cyclic])


def trained(strategy, steps: int, rates: Rates = HALVES, every: int = 1) -> dict[str, np.ndarray]:
    """1 where a step trains a unit: layers [steps, 4], heads [steps, 4, 4], neurons [steps, 4, 16]."""
    found = {
        name: np.zeros((steps, 4, *units), int) for name, units in (("layers", ()), ("heads", (4,)), ("neurons", (16,)))
    }
    for step in range(steps):
        plan = sample(5, step, Stage(1, 0, 10**6, rates), SIZES, SamplingConfig(resample_every=every), strategy)
        found["layers"][step, plan.layers] = 1
        for name in ("heads", "neurons"):
            found[name][step, plan.layers[:, None], getattr(plan, name)] = 1
    return found


@IN_TURN
@pytest.mark.parametrize(
    ("rates", "period"), [(HALVES, 4), (Rates(0.25, 0.5, 0.25), 16), (Rates(0.5, 0.25, 1.0), 4)], ids=str
)
def test_units_in_turn_are_trained_equally_often_in_every_period(strategy, rates, period):
    """A period is the draws until every layer, and inside it every part, had its turn."""
    for name, rate in (("layers", rates.layers), ("heads", rates.heads), ("neurons", rates.mlp)):
        inside = 1.0 if name == "layers" else rates.layers
        times = trained(strategy, 3 * period, rates)[name].reshape(3, period, 4, -1).sum(axis=1)
        assert (times == period * rate * inside).all(), name


def test_units_drawn_at_random_are_not():
    assert len(np.unique(trained(random, 8)["neurons"].sum(axis=0))) > 1


@IN_TURN
def test_a_plan_in_turn_lasts_resample_every_steps_too(strategy):
    assert (trained(strategy, 12, every=3)["heads"] == np.repeat(trained(strategy, 4)["heads"], 3, axis=0)).all()


def test_cyclic_keeps_its_parts_and_balanced_deals_them_anew():
    parts = [
        {tuple(neurons[step, 2].nonzero()[0]) for step in range(60) if neurons[step, 2].any()}
        for neurons in (trained(strategy, 60)["neurons"] for strategy in (cyclic, balanced))
    ]
    assert len(parts[0]) == 2
    assert len(parts[1]) > 20


def together(found: dict[str, np.ndarray], a: tuple[str, int, int], b: tuple[str, int, int]) -> list[int]:
    """How often the second unit is trained (0, 1), over the steps that train the first and the second's layer."""
    one, other = (found[name][:, layer, unit] for name, layer, unit in (a, b))
    both = other[(one == 1) & (found["layers"][:, b[1]] == 1)]
    return [int((both == 0).sum()), int(both.sum())]


@IN_TURN
def test_dimensions_and_layers_do_not_share_a_phase(strategy):
    """A head meets any neuron of its layer, and any head of another layer, in half of the steps: not always."""
    found = trained(strategy, 600)
    for other in (("neurons", 0, 3), ("heads", 2, 0), ("neurons", 2, 9)):
        assert chisquare(together(found, ("heads", 0, 1), other)).pvalue > 1e-3, other


@IN_TURN
def test_units_in_turn_need_a_rate_of_one_over_k(strategy):
    for rates, message in (
        (Rates(mlp=0.75), r"sampling\.mlp: .* 16 units .* and 12 are not .* 1/k, for example 0\.5"),
        (Rates(layers=0.75), r"sampling\.layers: .* 4 units .* and 3 are not"),
    ):
        with pytest.raises(UserError, match=message):
            sample(0, 0, Stage(1, 0, 10, rates), SIZES, SamplingConfig(), strategy)
