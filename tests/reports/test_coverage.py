"""How often parts were trained, against a plain count over every step."""

import dataclasses

import numpy as np
import pytest

from est_cli.config import ModelConfig, SamplingConfig
from est_cli.reports import coverage as coverage_module
from est_cli.reports.coverage import coverage
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import stage_at


def plain_count(run):
    model = ModelConfig(**run.config["model"])
    sampling = SamplingConfig(resample_every=run.config["sampling"]["resample_every"])
    layers, heads = np.zeros(model.n_layers), np.zeros((model.n_layers, model.n_heads))
    for step in range(run.steps_done):
        plan = sample(run.config["seed"], step, stage_at(run.stages, step), model, sampling)
        for position, layer in enumerate(plan.layers):
            layers[layer] += 1
            heads[layer, plan.heads[position]] += 1
    return layers / run.steps_done, heads / run.steps_done


@pytest.mark.parametrize("resample_every", [1, 7])
@pytest.mark.parametrize("done", [60, 25])
def test_coverage_is_what_a_plain_count_says(new_run, resample_every, done):
    run = new_run(steps=60, done=done, sampling={"resample_every": resample_every})
    found = coverage(run)
    layers, heads = plain_count(run)
    np.testing.assert_allclose(found.layers, layers)
    np.testing.assert_allclose(found.heads, heads)
    assert not found.thinned


def test_neurons_are_trained_as_often_as_their_layers_times_their_rate(one):
    found = coverage(one)
    sampled = sum(stage.steps * stage.rates.mlp * stage.rates.layers for stage in one.stages) / one.steps_done
    assert found.blocks.mean() == pytest.approx(sampled)
    assert found.blocks.shape == (4, 64)


def test_a_thinned_count_is_close_and_says_so(one, monkeypatch):
    whole = coverage(one)
    monkeypatch.setattr(coverage_module, "MAX_PLANS_PER_STAGE", 25)
    thin = coverage(one)
    assert thin.thinned and not whole.thinned and whole.noise == 0
    assert thin.heads.mean() == pytest.approx(whole.heads.mean(), abs=0.01)
    assert 0.3 * thin.noise < (thin.heads - whole.heads).std() < 3 * thin.noise


def test_leaving_neurons_out_changes_no_head(one, monkeypatch):
    whole = coverage(one)
    monkeypatch.setattr(coverage_module, "_MAX_RANKED_NEURONS", 1)
    without = coverage(one)
    np.testing.assert_array_equal(without.heads, whole.heads)
    np.testing.assert_array_equal(without.layers, whole.layers)
    np.testing.assert_allclose(without.blocks, whole.blocks, atol=0.15)


def test_blocks_follow_the_neurons_that_are_sampled_together(new_run):
    found = coverage(new_run(steps=60, sampling={"mlp_block": 48}))
    assert (found.blocks.shape, found.neurons_per_block) == ((4, 8), 48)


def test_the_reason_is_told_without_a_config_or_with_a_strategy_of_ones_own_which_is_not_run(one):
    sampling = {**one.config["sampling"], "strategy": "os.system"}
    for config, reason in (({**one.config, "sampling": sampling}, "os.system"), ({}, "config.yaml")):
        assert reason in coverage(dataclasses.replace(one, config=config))
