"""The learning rate over a run, and what the optimizer clips. test_equivalence.py has the rest of it."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import GPT2, random_master

from est_cli.config import OptimizerConfig
from est_cli.training.optimizer import SampledAdamW, learning_rate
from est_cli.training.subnetwork import Update

COSINE = OptimizerConfig(lr=1.0, warmup=10, decay="cosine", min_lr_ratio=0.1)
LINEAR = replace(COSINE, decay="linear")
WSD = replace(COSINE, decay="wsd")
EVERY = [COSINE, LINEAR, WSD, replace(COSINE, decay="none")]


def rates(config: OptimizerConfig, max_steps: int = 110, **changes) -> list[float]:
    return [learning_rate(replace(config, **changes), step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.decay)
@pytest.mark.parametrize("warmup", [10, 10 / 110])
def test_warmup_rises_in_equal_parts_to_the_full_rate(warmup, config):
    found = rates(config, warmup=warmup)
    assert found[:11] == pytest.approx([0.1 * (i + 1) for i in range(10)] + [1.0])
    assert max(found) == pytest.approx(1.0)


@pytest.mark.parametrize(("warmup", "step", "rate"), [(0, 0, 1.0), (0.0, 0, 1.0), (1, 0, 1.0), (1.0, 54, 0.5)], ids=str)
def test_warmup_is_a_number_of_steps_or_a_fraction_of_the_run(warmup, step, rate):
    assert rates(COSINE, warmup=warmup)[step] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("config", "at_35", "at_85"),
    [(COSINE, 0.1 + 0.45 * (1 + 0.5**0.5), 0.1 + 0.45 * (1 - 0.5**0.5)), (LINEAR, 0.775, 0.325)],
    ids=["cosine", "linear"],
)
def test_cosine_and_linear_decay_fall_to_the_smallest_rate_at_the_end(config, at_35, at_85):
    found = rates(config)
    assert [found[step] for step in (35, 60, 85)] == pytest.approx([at_35, 0.55, at_85])
    assert all(a > b for a, b in itertools.pairwise(found[10:]))
    assert learning_rate(config, 110, 110) == pytest.approx(0.1)


@pytest.mark.parametrize("decay_steps", [60, 60 / 110])
def test_decay_may_end_before_the_run_and_the_rate_then_stays(decay_steps):
    found = rates(LINEAR, decay_steps=decay_steps)
    assert found[60:] == pytest.approx([0.1] * 50)
    assert found[59] > 0.1


@pytest.mark.parametrize("length", [{"decay_steps": 22}, {"decay_steps": 0.2}, {"decay_fraction": 0.2}], ids=str)
def test_wsd_keeps_the_full_rate_and_falls_over_the_last_part_of_the_run(length):
    """110 steps: 10 of warmup, 78 at the full rate, 22 of decay, whose first one still has the full rate."""
    found = rates(WSD, **length)
    assert found[10:89] == [1.0] * 79
    assert all(a > b for a, b in itertools.pairwise(found[88:]))


@pytest.mark.parametrize("smallest", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["sqrt", "linear"])
def test_the_two_shapes_of_wsd_end_one_step_above_the_smallest_rate(shape, smallest):
    left = {"sqrt": lambda x: 1 - x**0.5, "linear": lambda x: 1 - x}[shape]
    config = replace(WSD, decay_steps=25, decay_shape=shape, min_lr_ratio=smallest)
    expected = [smallest + (1 - smallest) * left(i / 25) for i in range(25)]
    assert rates(config)[85:] == pytest.approx(expected, abs=1e-12)
    assert learning_rate(config, 110, 110) == pytest.approx(smallest, abs=1e-12)
    assert WSD.decay_shape == "sqrt"


@pytest.mark.parametrize("decay", ["cosine", "linear", "none"])
def test_what_wsd_adds_does_not_reach_the_other_decays(decay):
    config = replace(COSINE, decay=decay)
    assert rates(config, decay_fraction=0.9, decay_shape="linear") == rates(config)
    assert (set(rates(config)[10:]) == {1.0}) == (decay == "none")


@pytest.mark.parametrize("grad_clip", [0.5, 1e6, None])
def test_the_norm_is_that_before_clipping_over_all_sampled_rows(grad_clip):
    model = random_master(GPT2)
    optimizer = SampledAdamW(model, OptimizerConfig(grad_clip=grad_clip))
    updates = [Update(name, None, torch.randn_like(p.data)) for name, p in model.named_parameters()]
    expected = torch.cat([update.gradient.flatten() for update in updates]).norm()
    torch.testing.assert_close(optimizer.step(updates, lr=1e-3), expected, rtol=1e-12, atol=0)
    moments = torch.cat([moment.flatten() for moment in optimizer.moments.values()])
    clipped = min(float(expected), grad_clip or float(expected))
    assert moments.norm().item() == pytest.approx(0.1 * clipped, rel=1e-5)
