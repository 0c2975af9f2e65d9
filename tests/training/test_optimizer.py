"""The learning rate over a run, and what the optimizer decays, clips and counts."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import GPT2, random_batch, random_master, snapshot

from est_cli.config import OptimizerConfig, SamplingConfig
from est_cli.subnet.plan import subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.training.optimizer import SampledAdamW, learning_rate
from est_cli.training.subnetwork import PackedSubnetwork, Update

COSINE = OptimizerConfig(lr=1.0, warmup=10, decay="cosine", min_lr_ratio=0.1)
LINEAR = replace(COSINE, decay="linear")


def rates(config: OptimizerConfig, max_steps: int = 110) -> list[float]:
    return [learning_rate(config, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("warmup", [10, 10 / 110])
def test_warmup_rises_in_equal_parts_to_the_full_rate(warmup):
    found = rates(replace(COSINE, warmup=warmup))
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert max(found) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [0, 0.0])
def test_without_warmup_the_first_step_has_the_full_rate(warmup):
    assert rates(replace(COSINE, warmup=warmup))[0] == 1.0


def test_one_step_of_warmup_is_not_the_whole_run():
    """warmup=1 is a step, warmup=1.0 all of them."""
    assert rates(replace(COSINE, warmup=1))[0] == 1.0
    assert rates(replace(COSINE, warmup=1.0))[54] == pytest.approx(0.5)


def test_cosine_and_linear_decay_fall_to_the_smallest_rate_at_the_end():
    for config in (COSINE, LINEAR):
        found = rates(config)
        assert found[60] == pytest.approx(0.55), "half of the way in both"
        assert all(a > b for a, b in itertools.pairwise(found[10:]))
        assert learning_rate(config, 110, 110) == pytest.approx(0.1)
    assert rates(COSINE)[35] > rates(LINEAR)[35] > rates(LINEAR)[85] > rates(COSINE)[85]


def test_no_decay_stays():
    assert set(rates(replace(COSINE, decay="none"))[10:]) == {1.0}


@pytest.mark.parametrize("decay_steps", [60, 60 / 110])
def test_decay_may_end_before_the_run_and_the_rate_then_stays(decay_steps):
    found = rates(replace(LINEAR, decay_steps=decay_steps))
    assert found[60:] == pytest.approx([0.1] * 50)
    assert found[59] > 0.1


WSD = replace(COSINE, decay="wsd")


@pytest.mark.parametrize("length", [{"decay_steps": 22}, {"decay_steps": 0.2}, {"decay_fraction": 0.2}])
def test_wsd_keeps_the_full_rate_and_falls_over_the_last_part_of_the_run(length):
    """110 steps: 10 of warmup, 78 at the full rate, 22 of decay, whose first one still has the full rate."""
    found = rates(replace(WSD, **length))
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10:89] == [1.0] * 79
    assert all(a > b for a, b in itertools.pairwise(found[88:]))


def test_the_two_shapes_of_wsd_end_one_step_above_the_smallest_rate():
    for shape, expected in (("sqrt", lambda x: 1 - x**0.5), ("linear", lambda x: 1 - x)):
        for smallest in (0.0, 0.1):
            config = replace(WSD, decay_steps=25, decay_shape=shape, min_lr_ratio=smallest)
            assert rates(config)[85:] == pytest.approx(
                [smallest + (1 - smallest) * expected(i / 25) for i in range(25)], abs=1e-12
            )
            assert learning_rate(config, 110, 110) == pytest.approx(smallest, abs=1e-12)
    assert WSD.decay_shape == "sqrt"


def test_decay_steps_is_where_cosine_ends_and_how_long_wsd_takes():
    config = replace(COSINE, decay_steps=40)
    assert (config.decay_start(110), config.decay_end(110)) == (10, 40)
    config = replace(WSD, decay_steps=40)
    assert (config.decay_start(110), config.decay_end(110)) == (70, 110)
    assert replace(WSD, decay_steps=1).decay_start(110) == 109
    assert replace(WSD, decay_steps=1.0, warmup=0).decay_start(110) == 0


def test_what_wsd_adds_does_not_reach_the_other_decays():
    for config in (COSINE, LINEAR, replace(COSINE, decay="none")):
        assert rates(replace(config, decay_fraction=0.9, decay_shape="linear")) == rates(config)


def zero_update(model: torch.nn.Module) -> list[Update]:
    return [Update(name, None, torch.zeros_like(parameter)) for name, parameter in model.named_parameters()]


def test_matrices_and_embeddings_decay_and_nothing_else():
    model = random_master(GPT2)
    before, optimizer = snapshot(model), SampledAdamW(model, OptimizerConfig(weight_decay=0.5))
    optimizer.step(zero_update(model), lr=0.1)
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if parameter.dim() >= 2 else 1.0)
        torch.testing.assert_close(parameter.data, expected, rtol=0, atol=1e-15)


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


@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
def test_every_row_counts_the_steps_that_it_took(unsampled):
    model, sampling, stage = random_master(GPT2), SamplingConfig(), Stage(1, 0, 5, Rates(0.5, 0.5, 0.5))
    optimizer = SampledAdamW(model, OptimizerConfig(unsampled=unsampled))
    subnet = PackedSubnetwork(model, subnetwork(GPT2, sampling, stage.rates), torch.float64)
    heads = torch.zeros(GPT2.n_layers, GPT2.n_heads, dtype=torch.int64)
    for step in range(5):
        plan = sample(0, step, stage, GPT2, sampling)
        for layer, kept in zip(plan.layers.tolist(), plan.heads, strict=True):
            heads[layer, kept] += 1
        subnet.load(plan)
        subnet.loss(*random_batch(GPT2)).backward()
        optimizer.step(subnet.updates(), 1e-3)
    state = optimizer.state()
    for layer in range(GPT2.n_layers):
        counts = state[f"counts.blocks.{layer}.attention.out.weight"]
        assert torch.equal(counts, heads[layer] if unsampled == "freeze" else torch.full_like(heads[layer], 5))
    assert state["counts.embedding"].tolist() == [5]
