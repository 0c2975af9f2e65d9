"""Sampled subnetworks lose what the reference says that they lose, and plans of two rates are pairs."""

import numpy as np
import pytest
import torch
from adapter import reference_plan, reference_tensors
from reference import loss as reference_loss
from tiny import FAMILIES, FULL, LLAMA, THREE_STAGES, random_master, snapshot, train_config

from est_cli.config import SamplingConfig
from est_cli.evaluation.loss import mean_and_std, partial_rates, spread
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage

WINDOWS = np.random.default_rng(0).integers(29, size=(5, 9))
STAGE_1, STAGE_2 = Rates(0.5, 0.5, 0.5), Rates(0.5, 0.5)


def expected_loss(model, weights, plan, rescale_layers: bool = False) -> float:
    """The reference's, over all windows at once."""
    tokens = torch.from_numpy(WINDOWS)
    named = reference_tensors(model.config, weights)
    return reference_loss(model.config, named, plan, tokens[:, :-1], tokens[:, 1:], rescale_layers).item()


@pytest.mark.parametrize("sampling", [SamplingConfig(resample_every=5), SamplingConfig(rescale_layers=True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_loss_is_the_references_for_a_plan_of_its_own_and_the_weights_stay(family, sampling):
    model = random_master(FAMILIES[family])
    before = snapshot(model)
    found = spread(model, sampling, STAGE_1, WINDOWS, batch_size=2, plans=3, seed=7)
    stage = Stage(1, 0, 3, STAGE_1)
    plans = [reference_plan(sample(7, step, stage, model.config, SamplingConfig())) for step in range(3)]
    losses = found["losses"]
    assert losses == pytest.approx([expected_loss(model, before, plan, sampling.rescale_layers) for plan in plans])
    assert len(set(losses)) == 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (found["mean"], found["std"]) == (np.mean(losses), np.std(losses, ddof=1))
    assert list(found["quantiles"].values()) == np.quantile(losses, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    assert mean_and_std(losses[:1]) == {"mean": losses[0], "std": 0.0}


def test_plans_of_two_rates_share_what_both_keep():
    """So the losses can be compared plan by plan: the kept layers have the same heads and neurons."""
    for step in range(4):
        small, large = (sample(3, step, Stage(1, 0, 4, rates), LLAMA, SamplingConfig()) for rates in (STAGE_1, STAGE_2))
        for position, layer in enumerate(small.layers.tolist()):
            assert (small.heads[position] == large.heads[layer]).all()
            assert (small.neurons[position] == large.neurons[layer]).all()


def test_only_rates_that_sample_are_measured_each_once():
    stages = [*train_config(stages=THREE_STAGES).stages, *train_config(stages=FULL).stages]
    assert partial_rates([*stages, *stages]) == [STAGE_1, STAGE_2]
