"""Growth: what has joined the model by each stage, and which trained layer every layer of the larger model starts from.

Heads and neurons that join always start with output rows of 0: they have no trained ones to copy.
"""

from dataclasses import dataclass

from est_cli.config import ModelConfig, TrainConfig
from est_cli.subnet.plan import grown_model
from est_cli.subnet.schedule import Stage, layer_sources, stage_at


@dataclass(frozen=True)
class Growth:
    """From one part of the model to a larger one, at the start of a stage."""

    before: ModelConfig
    after: ModelConfig
    method: str

    @property
    def sources(self) -> list[int | None]:
        """For every layer of the larger model the layer that it starts from, None for its initial weights."""
        return layer_sources(self.method, self.before.n_layers, self.after.n_layers)

    @property
    def joined(self) -> list[int]:
        """The layers of the larger model that are not a trained layer in its old or new place."""
        sources = self.sources
        return [layer for layer, source in enumerate(sources) if source is None or source in sources[:layer]]

    def __str__(self) -> str:
        parts = [
            f"{before} to {after} {what}"
            for what, before, after in (
                ("layers", self.before.n_layers, self.after.n_layers),
                ("heads", self.before.n_heads, self.after.n_heads),
                ("neurons", self.before.d_ff, self.after.d_ff),
            )
            if before != after
        ]
        return f"grows from {', '.join(parts)} ({self.method})"


def stage_models(config: TrainConfig) -> list[ModelConfig]:
    """What has joined by each stage."""
    return [_joined_by(config, stage) for stage in config.stages]


def model_after(config: TrainConfig, steps: int) -> ModelConfig:
    """What a checkpoint of `steps` optimizer steps holds: at a boundary the smaller model, which grows afterwards."""
    return _joined_by(config, stage_at(config.stages, max(0, steps - 1)))


def growth_into(config: TrainConfig, stage: Stage) -> Growth | None:
    """The growth at the start of `stage`; None where nothing joins."""
    before, after = model_after(config, stage.first_step), _joined_by(config, stage)
    return None if before == after else Growth(before, after, config.scheduler.grow)


def _joined_by(config: TrainConfig, stage: Stage) -> ModelConfig:
    return grown_model(config.model, stage.grown, config.sampling.mlp_block)
