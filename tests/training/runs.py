"""Runs of the loop on tiny models: arms of every kind, and how two runs are compared."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tiny import GPT2, LLAMA, THREE_STAGES, RandomTokens, Recorder, train_config

from est_cli.config import ModelConfig, OptimizerConfig, RescaleConfig, SamplingConfig, SchedulerConfig, TrainConfig
from est_cli.subnet.schedule import Rates, StageSpec, layer_drop, raptr, stacking
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import World
from est_cli.training.loop import Outcome, Training

CPU = World(device=torch.device("cpu"))
STEPS = 15
SIX = replace(GPT2, n_layers=6)
SIX_LLAMA = replace(LLAMA, n_layers=6)
OPTIMIZER = OptimizerConfig(lr=5e-3, weight_decay=0.1, grad_clip=0.5, warmup=3)


@dataclass(frozen=True)
class Arm:
    stages: tuple[StageSpec, ...]
    grow: str = "stack"
    grow_moments: str = "copy"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    model: ModelConfig = SIX
    sources: tuple[int | None, ...] = ()
    """The layer that each layer starts from in the growth at step 6, written by hand."""

    def config(self, unsampled: str = "zero_grad", **trainer) -> TrainConfig:
        optimizer = replace(OPTIMIZER, unsampled=unsampled)
        config = train_config(self.model, self.sampling, optimizer, self.stages, max_steps=STEPS, **trainer)
        return replace(config, scheduler=SchedulerConfig(self.stages, self.grow, self.grow_moments))


def stacked(grow: str, *sources: int | None, depth: int = 2, **options) -> Arm:
    return Arm(tuple(stacking(Rates(), 6, depth)), grow, sources=sources, **options)


ENDS = SamplingConfig(layer_strategy="ends", rescale=RescaleConfig(layers="sqrt"))
BY_DEPTH = SamplingConfig(layer_strategy="increasing", rescale=RescaleConfig(layers="inverse"))
UNSCALED = SamplingConfig(rescale=RescaleConfig(heads="none", mlp="sqrt"))
ARMS = {
    "three stages": Arm(THREE_STAGES, sampling=SamplingConfig(resample_every=3), model=LLAMA),
    "three stages of gpt2": Arm(THREE_STAGES, sampling=SamplingConfig(rescale_layers=True), model=GPT2),
    "stack": stacked("stack", 0, 1, 0, 1, 0, 1),
    "stack, reset": stacked("stack", 0, 1, 0, 1, 0, 1, grow_moments="reset"),
    "interleave": stacked("interleave", 0, 0, 0, 1, 1, 1, model=SIX_LLAMA),
    "interleave, reset": stacked("interleave", 0, 0, 0, 1, 1, 1, grow_moments="reset"),
    "middle": stacked("middle", 0, 1, 2, 1, 2, 3, depth=4),
    "zero": stacked("zero", 0, 1, None, None, None, None),
    "zero from nothing": stacked("zero", *[None] * 6, depth=0),
    "random": stacked("random", 0, 1, None, None, None, None, model=SIX_LLAMA),
    "one layer": stacked("stack", *[0] * 6, depth=1),
    "heads and neurons": Arm((StageSpec(6, n_heads=2, d_ff=6), StageSpec()), sources=tuple(range(6)), model=SIX_LLAMA),
    "everything, sampled": Arm(
        (StageSpec(6, 0.5, 0.5, 0.5, n_layers=4, n_heads=2, d_ff=8), StageSpec(10, 0.5, 0.5, 0.75), StageSpec()),
        sources=(0, 1, 2, 3, 0, 1),
    ),
    "raptr": Arm(tuple(raptr(Rates(layers=0.5), 3)), sampling=ENDS),
    "layer_drop": Arm(tuple(layer_drop(Rates(), 0.7, 3)), sampling=BY_DEPTH),
    "neither scaled as in the paper": Arm((StageSpec(6, 0.5, 0.5), StageSpec()), sampling=UNSCALED),
}
GROWING = [name for name, arm in ARMS.items() if arm.sources]


def start(config: TrainConfig, kind: type[Training] = Training, tokens=None) -> tuple[Training, Recorder]:
    recorder = Recorder()
    return kind(config, tokens or RandomTokens(config.model.vocab_size), CPU, [recorder]), recorder


def resumed(config: TrainConfig, folder: Path, kind: type[Training] = Training) -> tuple[Training, Recorder]:
    """A new object that knows only the checkpoint."""
    training, recorder = start(config, kind)
    training.restore(Checkpoints(folder).newest(pytest.fail))
    return training, recorder


def train(training: Training, folder: Path, stop_after: int | None = None) -> Outcome:
    return training.run(Checkpoints(folder), stopping=lambda: training.step == stop_after)


def finished(config: TrainConfig, folder: Path) -> tuple[Training, Recorder]:
    training, recorder = start(config)
    assert train(training, folder).status == "done"
    return training, recorder


def told(*recorders: Recorder) -> list[dict]:
    """The records without the times: two runs must agree in them."""
    records = [record for recorder in recorders for record in recorder.records]
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]


def assert_same_bits(ours: Training, theirs: Training) -> None:
    """Weights, moments and step counts."""
    torch.testing.assert_close(ours.weights() | ours.moments(), theirs.weights() | theirs.moments(), rtol=0, atol=0)
