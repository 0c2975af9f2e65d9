"""Layers that join the model as copies of those below."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, snapshot, train_config

from est_cli.config import OptimizerConfig, SamplingConfig
from est_cli.subnet.schedule import StageSpec
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.growth import stack_layers
from tests.training.test_loop import repeatable, run, start

FIRST = 6
"""The step at which the model grows from one of its three layers to all."""
STACKED = SamplingConfig(strategy="prefix", stack_layers=True)


def config(family: str, unsampled: str = "freeze", sampling: SamplingConfig = STACKED):
    stages = (StageSpec(FIRST, layers=0.3), StageSpec())
    return train_config(FAMILIES[family], sampling, OptimizerConfig(lr=3e-3, unsampled=unsampled), stages)


def of_layer(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer, by their names inside it; a row's step count is one too."""
    mark = f"blocks.{layer}."
    return {name.replace(mark, "", 1): tensor for name, tensor in tensors.items() if mark in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_weights_moments_and_step_counts_and_nothing_else_moves(family):
    training, _ = start(config(family))
    for _ in range(FIRST):
        training._train_step(training.stages[0], training._build(training.stages[0]))
    before = {name: tensor.clone() for name, tensor in training.optimizer.state().items()} | snapshot(training.model)
    stack_layers(training.optimizer, 1, 3)
    after = training.optimizer.state() | snapshot(training.model)
    trained = of_layer(before, 0)
    assert any(not torch.equal(tensor, of_layer(before, 1)[name]) for name, tensor in trained.items())
    for layer in range(3):
        for name, tensor in of_layer(after, layer).items():
            assert torch.equal(tensor, trained[name]), f"layer {layer}: {name}"
    for name, tensor in before.items():
        if ".blocks." not in f".{name}":
            assert torch.equal(tensor, after[name]), name


def test_several_layers_are_copied_in_their_order_over_and_over():
    training, _ = start(config("gpt2"))
    before = snapshot(training.model)
    stack_layers(training.optimizer, 2, 3)
    after = snapshot(training.model)
    for layer, source in enumerate((0, 1, 0)):
        for name, tensor in of_layer(after, layer).items():
            assert torch.equal(tensor, of_layer(before, source)[name])


@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
def test_a_run_grows_once_at_the_first_step_of_the_stage(tmp_path, unsampled):
    """The same as stopping there, copying by hand and going on without the setting."""
    whole, recorder = run(config("llama", unsampled), tmp_path / "whole")
    first, before = start(config("llama", unsampled, replace(STACKED, stack_layers=False)))
    first.run(Checkpoints(tmp_path / "hand"), stopping=lambda: first.step == FIRST)
    stack_layers(first.optimizer, 1, 3)
    first.run(Checkpoints(tmp_path / "hand"), stopping=lambda: False)
    assert repeatable(before.records) == repeatable(recorder.records)
    for name, tensor in snapshot(first.model).items():
        assert torch.equal(tensor, snapshot(whole.model)[name]), name


@pytest.mark.parametrize("stop", [FIRST - 1, FIRST, FIRST + 1])
def test_a_run_that_is_stopped_around_its_growth_ends_with_the_same_weights(tmp_path, stop):
    whole, recorder = run(config("llama"), tmp_path / "whole")
    first, before = start(config("llama"))
    first.run(Checkpoints(tmp_path / "parts"), stopping=lambda: first.step == stop)
    second, after = start(config("llama"))
    second.restore(Checkpoints(tmp_path / "parts").newest(pytest.fail))
    second.run(Checkpoints(tmp_path / "parts"), stopping=lambda: False)
    assert repeatable([*before.records, *after.records]) == repeatable(recorder.records)
    for name, tensor in snapshot(second.model).items():
        assert torch.equal(tensor, snapshot(whole.model)[name]), name
