"""A plan: the heads, neurons and layers that one optimizer step trains, and the small model that they make.

Three models nest: the full one; the part that has joined by a stage, its first layers, heads and neurons
(`grown_model`); and what a step samples of that part (`subnetwork`).
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from est_cli.config import ModelConfig, Rescale, SamplingConfig, TrainConfig
from est_cli.subnet.schedule import Grown, Rates, Stage, StageSpec, keep, layer_sources, stage_at
from est_cli.subnet.strategies import inclusion_probabilities


@dataclass(frozen=True)
class Subnetwork:
    """The shape of a sampled subnetwork: a smaller model, and the rescale of its heads and neurons."""

    model: ModelConfig
    head_scale: float = 1.0
    mlp_scale: float = 1.0
    scales_layers: bool = False
    """Whether the plan also scales every layer by a number of its own."""

    @property
    def is_scaled(self) -> bool:
        """Whether any residual branch is multiplied by something other than 1."""
        return self.scales_layers or self.head_scale != 1.0 or self.mlp_scale != 1.0


@dataclass(frozen=True)
class Plan:
    """The sampled units, sorted and unique, in the numbering of the full model.

    layers    [n]         kept layers
    heads     [n, n_heads]     query heads of each kept layer
    kv_heads  [n, n_kv_heads]  key/value heads of each kept layer
    neurons   [n, d_ff]        MLP neurons of each kept layer
    scales    [n, 2]           what the attention and MLP branches of each kept layer are multiplied by
    """

    layers: np.ndarray
    heads: np.ndarray
    kv_heads: np.ndarray
    neurons: np.ndarray
    scales: np.ndarray

    def as_dict(self) -> dict[str, list]:
        return {name: array.tolist() for name, array in vars(self).items()}


def whole_plan(model: ModelConfig) -> Plan:
    """Every unit of `model`, which is the full model or the part of it that has joined; nothing is rescaled."""

    def every(units: int) -> np.ndarray:
        return np.tile(np.arange(units), (model.n_layers, 1))

    layers, scales = np.arange(model.n_layers), np.ones((model.n_layers, 2))
    return Plan(layers, every(model.n_heads), every(model.n_kv_heads), every(model.d_ff), scales)


def grown_model(model: ModelConfig, grown: Grown, mlp_block: int = 1) -> ModelConfig:
    """The part of `model` that has joined. Raises ValueError, as `Grown.sizes` does."""
    return replace(model, **grown.sizes(model, mlp_block))


@dataclass(frozen=True)
class Growth:
    """From one part of the model to a larger one, at the start of a stage.

    Heads and neurons that join always start with output rows of 0: they have no trained ones to copy.
    """

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
        words = {"n_layers": "layers", "n_heads": "heads", "d_ff": "neurons"}
        sizes = [(getattr(self.before, key), getattr(self.after, key), word) for key, word in words.items()]
        parts = [f"{before} to {after} {word}" for before, after, word in sizes if before != after]
        return f"grows from {', '.join(parts)} ({self.method})"


def stage_models(config: TrainConfig) -> list[ModelConfig]:
    """What has joined by each stage."""
    return [grown_model(config.model, stage.grown, config.sampling.mlp_block) for stage in config.stages]


def model_after(config: TrainConfig, steps: int) -> ModelConfig:
    """What a checkpoint of `steps` optimizer steps holds: at a boundary the smaller model, which grows afterwards."""
    return stage_models(config)[stage_at(config.stages, max(0, steps - 1)).number - 1]


def growth_into(config: TrainConfig, stage: Stage) -> Growth | None:
    """The growth at the start of `stage`; None if nothing joins."""
    models = stage_models(config)
    before, after = models[max(0, stage.number - 2)], models[stage.number - 1]
    return None if before == after else Growth(before, after, config.scheduler.grow)


def samples_queries(model: ModelConfig, sampling: SamplingConfig) -> bool:
    """Whether query heads are drawn within each group and every key/value head is kept: grouped-query models only."""
    return sampling.gqa == "query" and model.n_kv_heads != model.n_heads


def stage_subnetwork(model: ModelConfig, sampling: SamplingConfig, stage: Stage | StageSpec) -> Subnetwork:
    """The shape of every subnetwork that a stage samples, from the part of `model` that has joined by then."""
    return subnetwork(grown_model(model, stage.grown, sampling.mlp_block), sampling, stage.rates)


def stage_subnetworks(config: TrainConfig) -> list[Subnetwork]:
    """The shape of the subnetworks of each stage of a run."""
    return [stage_subnetwork(config.model, config.sampling, stage) for stage in config.stages]


def subnetwork(model: ModelConfig, sampling: SamplingConfig, rates: Rates) -> Subnetwork:
    """The shape of every subnetwork that these rates sample from `model`; `model` itself if every count is full."""
    n_kv_heads, per_group = model.n_kv_heads, model.n_heads // model.n_kv_heads
    if samples_queries(model, sampling):
        per_group = keep(rates.heads, per_group)
    else:
        n_kv_heads = keep(rates.heads, n_kv_heads)
    n_heads = n_kv_heads * per_group
    d_ff = keep(rates.mlp, model.d_ff // sampling.mlp_block) * sampling.mlp_block
    n_layers = keep(rates.layers, model.n_layers)
    small = replace(model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=d_ff)
    return Subnetwork(
        small,
        head_scale=float(_rescale(sampling.rescale.heads, model.n_heads / n_heads)),
        mlp_scale=float(_rescale(sampling.rescale.mlp, model.d_ff / d_ff)),
        scales_layers=sampling.rescale_of_layers != "none" and n_layers < model.n_layers,
    )


def branch_scales(shape: Subnetwork, sampling: SamplingConfig, n_layers: int, layers: np.ndarray) -> np.ndarray:
    """[n, 2]: what the attention and MLP branches of the kept `layers` of `n_layers` are multiplied by."""
    units = np.array([shape.head_scale, shape.mlp_scale])
    if not shape.scales_layers:
        return np.tile(units, (len(layers), 1))
    kept = inclusion_probabilities(sampling.strategy_of_layers, n_layers, len(layers))[layers]
    return units * _rescale(sampling.rescale_of_layers, 1.0 / kept)[:, None]


def _rescale(mode: Rescale, inverse: float | np.ndarray) -> float | np.ndarray:
    """The scale of units that are kept with probability 1 / `inverse`."""
    return inverse ** {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}[mode]


def effective_rates(model: ModelConfig, sampling: SamplingConfig, stage: Stage | StageSpec) -> Rates:
    """The fractions of the full model that are really kept, after rounding to whole units."""
    small = stage_subnetwork(model, sampling, stage).model
    return Rates(small.n_heads / model.n_heads, small.d_ff / model.d_ff, small.n_layers / model.n_layers)


RowKind = Literal["qkv", "heads", "up", "neurons"]
"""What one row of a parameter that is sampled inside a layer belongs to; the parameter is a matrix of such rows.

kind      rows                       unit
qkv       H query, K key, K value    heads, key/value heads
heads     H                          heads (the attention's output projection)
up        F, or F gate and F up      neurons (shared by gate and up)
neurons   F                          neurons (the MLP's output projection)

Parameters are neuron-major, so a sampled row is contiguous: head_dim rows of a projection, one row of an MLP matrix.
"""


def n_rows(kind: RowKind, model: ModelConfig) -> int:
    """How many rows a parameter of this kind has in `model`."""
    return {
        "qkv": model.n_heads + 2 * model.n_kv_heads,
        "heads": model.n_heads,
        "up": (2 if model.gated else 1) * model.d_ff,
        "neurons": model.d_ff,
    }[kind]


def sampled_rows(kind: RowKind, model: ModelConfig, plan: Plan, position: int) -> np.ndarray:
    """Rows of the full parameter, ascending, that the kept layer at `position` of the plan trains."""
    heads, kv_heads, neurons = plan.heads[position], plan.kv_heads[position], plan.neurons[position]
    if kind == "qkv":
        keys = model.n_heads + kv_heads
        return np.concatenate([heads, keys, keys + model.n_kv_heads])
    if kind == "heads":
        return heads
    return np.concatenate([neurons, model.d_ff + neurons]) if kind == "up" and model.gated else neurons
