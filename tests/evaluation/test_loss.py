"""Sampled subnetworks lose what the reference says that they lose, and plans of two rates are pairs."""

import numpy as np
import pytest
import torch
from adapter import reference_plan, reference_tensors, sizes
from reference import full_plan
from reference import loss as reference_loss
from tiny import FAMILIES, FULL, LLAMA, THREE_STAGES, random_master, snapshot, train_config

from est_cli.config import SamplingConfig
from est_cli.evaluation.loss import mean_and_std, partial_rates, spread
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.training.validation import mean_loss

WINDOWS = np.random.default_rng(0).integers(29, size=(5, 9))
STAGE_1, STAGE_2 = Rates(0.5, 0.5, 0.5), Rates(0.5, 0.5)


@pytest.mark.parametrize("sampling", [SamplingConfig(resample_every=5), SamplingConfig(rescale_layers=True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_loss_is_the_references_for_a_plan_of_its_own(family, sampling):
    model = random_master(FAMILIES[family])
    found = spread(model, sampling, STAGE_1, WINDOWS, batch_size=2, plans=3, seed=7)
    tokens = torch.from_numpy(WINDOWS)
    weights = reference_tensors(model.config, snapshot(model))
    expected = [
        reference_loss(
            sizes(model.config),
            weights,
            reference_plan(sample(7, step, Stage(1, 0, 3, STAGE_1), model.config, SamplingConfig())),
            tokens[:, :-1],
            tokens[:, 1:],
            sampling.rescale_layers,
        ).item()
        for step in range(3)
    ]
    assert found["losses"] == pytest.approx(expected)
    assert len(set(found["losses"])) == 3


def test_the_full_models_loss_is_the_mean_over_all_windows():
    model, tokens = random_master(LLAMA), torch.from_numpy(WINDOWS)
    every = full_plan(sizes(LLAMA))
    weights = reference_tensors(LLAMA, snapshot(model))
    expected = reference_loss(sizes(LLAMA), weights, every, tokens[:, :-1], tokens[:, 1:], False)
    assert mean_loss(model, WINDOWS, batch_size=2) == pytest.approx(expected.item())


def test_the_weights_stay():
    model = random_master(LLAMA)
    before = snapshot(model)
    spread(model, SamplingConfig(), STAGE_1, WINDOWS, batch_size=2, plans=2, seed=0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_plans_of_two_rates_share_what_both_keep():
    """So the losses can be compared plan by plan: the kept layers have the same heads and neurons."""
    for step in range(4):
        small, large = (sample(3, step, Stage(1, 0, 4, rates), LLAMA, SamplingConfig()) for rates in (STAGE_1, STAGE_2))
        for position, layer in enumerate(small.layers.tolist()):
            assert (small.heads[position] == large.heads[layer]).all()
            assert (small.neurons[position] == large.neurons[layer]).all()


def test_the_numbers_of_a_spread_are_numpys():
    found = spread(random_master(LLAMA), SamplingConfig(), STAGE_1, WINDOWS, batch_size=2, plans=4, seed=0)
    losses = found["losses"]
    assert (found["mean"], found["std"]) == (np.mean(losses), np.std(losses, ddof=1))
    assert list(found["quantiles"].values()) == np.quantile(losses, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    assert mean_and_std([1.0])["std"] == 0.0


def test_only_rates_that_sample_are_measured_each_once():
    stages = [*train_config(stages=THREE_STAGES).stages, *train_config(stages=FULL).stages]
    assert partial_rates([*stages, *stages]) == [STAGE_1, STAGE_2]
