"""Growth: which trained layer every layer of the larger model starts from.

method      6 layers from 3   the layers that join
stack       0 1 2 0 1 2       the trained block once more (Gong et al., 2019; Du et al., 2024, arXiv 2405.15319)
interleave  0 0 1 1 2 2       every layer after itself
middle      0 1 2 0 1 2       the middle layers again, after themselves: of 4 to 6 layers 0 1 2 1 2 3
                              (MIDAS: Saunshi et al., 2024, arXiv 2409.19044)
zero        0 1 2 · · ·       as initialised, output projections 0: the function stays
random      0 1 2 · · ·       as initialised

Heads and neurons that join always start with output rows of 0: they have no trained ones to copy.
"""

from dataclasses import dataclass

from est_cli.config import GrowMethod, ModelConfig, TrainConfig
from est_cli.subnet.plan import grown_model
from est_cli.subnet.schedule import Stage, stage_at


@dataclass(frozen=True)
class Growth:
    """From one part of the model to a larger one, at the start of a stage."""

    before: ModelConfig
    after: ModelConfig
    method: GrowMethod

    @property
    def sources(self) -> list[int | None]:
        """For every layer of the larger model the layer that it starts from, None for its initial weights.

        No source lies above its target, so that copying from the last layer down overwrites nothing that is needed.
        """
        old, new = self.before.n_layers, self.after.n_layers
        added = new - old
        if self.method == "stack":
            return [layer % old for layer in range(new)]
        if self.method == "interleave":
            return [layer * old // new for layer in range(new)]
        if self.method == "middle":
            size = min(old, added)
            start = (old - size) // 2
            middle = [start + layer % size for layer in range(added)]
            return [*range(start + size), *middle, *range(start + size, old)]
        return [*range(old), *[None] * added]

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
