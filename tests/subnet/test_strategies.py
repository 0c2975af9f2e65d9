"""Strategies, and the random words that they choose by."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny import LLAMA

from est_cli.config import SamplingConfig
from est_cli.errors import UserError
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.subnet.strategies import STRATEGIES, Draw, _smallest, inclusion_probabilities, increasing, random

DRAW = Draw(seed=1, stage_start=10, number=0, layer=2, dimension="heads", group=1)
GROUPED = replace(LLAMA, n_heads=8, n_kv_heads=2)


def test_words_are_pinned():
    first = Draw(seed=0, stage_start=0, number=0, layer=0, dimension="heads")
    words = [0x2F4BA6408E4D89B, 0x3DD62B0B9CA8C5B2, 0x1C8667A55D902E79, 0x907D7A052FD5B4DC]
    assert first.words(4).tolist() == first.words(9).tolist()[:4] == words, "however many are asked for"
    last = Draw(seed=2**63 - 1, stage_start=20000, number=12345, layer=7, dimension="mlp", group=3)
    assert last.words(3).tolist() == [0x2A57AC09B2A1B2F3, 0x2BD18DD37E857B64, 0xBA0896271CEF653C]


def test_layers_steps_seeds_stages_and_dimensions_draw_independently():
    """Two draws whose keys differ in one part only agree no more often than chance: once in six."""
    draws = [replace(DRAW, number=number) for number in range(1200)]
    changes = [{"seed": 2}, {"stage_start": 11}, {"layer": 3}, {"dimension": "mlp"}, {"group": 2}]
    others = [[replace(draw, **change) for draw in draws] for change in changes]
    others.append([replace(draw, number=draw.number + 1) for draw in draws])
    for other in others:
        agree = sum(set(random(a, 4, 2)) == set(random(b, 4, 2)) for a, b in zip(draws, other, strict=True))
        assert chisquare([agree, 1200 - agree], [200, 1000]).pvalue > 1e-3, (other[0], agree)


@pytest.mark.parametrize("gqa", ["group", "query"])
def test_prefix_keeps_the_first_units_of_every_dimension_or_only_of_the_layers(gqa):
    stage = Stage(1, 0, 20, Rates(0.5, 0.5, 0.5))
    plan = sample(0, 3, stage, GROUPED, SamplingConfig(gqa=gqa, strategy="prefix"))
    assert plan.layers.tolist() == [0, 1]
    assert plan.heads[0].tolist() == ([0, 1, 2, 3] if gqa == "group" else [0, 1, 4, 5])
    assert plan.neurons[0].tolist() == list(range(8))
    plans = [sample(0, step, stage, GROUPED, SamplingConfig(gqa=gqa, layer_strategy="prefix")) for step in range(20)]
    assert all(plan.layers.tolist() == [0, 1] for plan in plans)
    assert len({tuple(plan.neurons[0]) for plan in plans}) == 20


@pytest.mark.parametrize("kept", range(1, 8))
def test_ends_keeps_the_first_and_the_last_and_every_subset_between_them_equally_often(kept):
    draws = [replace(DRAW, number=number, dimension="layers") for number in range(1500)]
    found = Counter(frozenset(STRATEGIES["ends"](draw, 8, kept).tolist()) for draw in draws)
    assert all(len(chosen) == kept and {0, 7} & chosen == set([0, 7][:kept]) for chosen in found)
    assert len(found) == math.comb(6, max(0, kept - 2))
    assert len(found) == 1 or chisquare(list(found.values())).pvalue > 1e-3


@pytest.mark.parametrize(("total", "kept"), [(8, 4), (8, 6), (8, 7), (12, 9), (5, 3), (2, 1)])
def test_increasing_leaves_out_layer_l_with_a_probability_that_rises_with_l(total, kept):
    draws, often = 4000, np.zeros(total)
    for number in range(draws):
        chosen = increasing(replace(DRAW, number=number, dimension="layers"), total, kept)
        assert len(set(chosen.tolist())) == kept
        assert 0 <= chosen.min() <= chosen.max() < total
        often[chosen] += 1
    p_max = 2 * (total - kept) / total
    expected = [1 - p_max * layer / (total - 1) for layer in range(total)]
    np.testing.assert_allclose(inclusion_probabilities("increasing", total, kept), expected, rtol=1e-12)
    assert expected[0] == often[0] / draws == 1, "the first layer is always there"
    np.testing.assert_allclose(often / draws, expected, atol=4 * 0.5 / draws**0.5)


def test_increasing_needs_half_of_the_layers():
    with pytest.raises(UserError, match=r"layer_strategy=increasing: keeps at least half of the 8 layers"):
        increasing(DRAW, 8, 3)


@pytest.mark.parametrize("largest", [3, 40, 2**64 - 1], ids="words-below-{}".format)
def test_the_chosen_units_are_those_of_a_stable_sort(largest):
    """The ranks of the words, which golden values pin; equal words too."""
    random = np.random.default_rng(0)
    for total in (1, 2, 7, 64):
        words = random.integers(largest, size=total, dtype=np.uint64)
        for kept in range(total + 1):
            assert _smallest(words, kept).tolist() == sorted(np.argsort(words, kind="stable")[:kept].tolist())
