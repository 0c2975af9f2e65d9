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
from est_cli.subnet.strategies import Draw, prefix, random

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
    with pytest.raises(UserError, match=r"sampling\.strategy=randm: must be one of random, prefix.*mean 'random'"):
        strategy_named("randm")


@pytest.mark.parametrize("path", ["no_such_module.strategy", "est_cli.subnet.sampler.no_such_name"])
def test_a_dotted_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(UserError, match=r"sampling\.strategy=.*cannot be imported"):
        strategy_named(path)
