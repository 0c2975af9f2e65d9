"""The sampler: a plan is a pure function of the seed, the step, the stage and the sizes."""

import numpy as np

from est_cli.config import ModelConfig, SamplingConfig, TrainConfig
from est_cli.errors import UserError
from est_cli.plugins import named_function
from est_cli.subnet.plan import Plan, branch_scales, grown_model, samples_queries, subnetwork
from est_cli.subnet.schedule import Stage
from est_cli.subnet.strategies import STRATEGIES, Draw


def sample(seed: int, step: int, stage: Stage, model: ModelConfig, sampling: SamplingConfig) -> Plan:
    """The plan of optimizer step `step`, which lies in `stage`. Raises UserError for a strategy that fails."""
    model = grown_model(model, stage.grown, sampling.mlp_block)
    shape = subnetwork(model, sampling, stage.rates)
    small = shape.model
    number = (step - stage.first_step) // sampling.resample_every

    def choose(dimension: str, total: int, kept: int, layer: int = 0, group: int = 0) -> np.ndarray:
        key = "layer_strategy" if dimension == "layers" and sampling.layer_strategy else "strategy"
        strategy = named_function(getattr(sampling, key), STRATEGIES, f"sampling.{key}")
        if kept == total:
            return np.arange(total)
        draw = Draw(seed, stage.first_step, number, layer, dimension, group)
        chosen = np.sort(np.asarray(strategy(draw, total, kept)))
        inside = chosen.shape == (kept,) and chosen.dtype.kind in "iu" and chosen[0] >= 0 and chosen[-1] < total
        if not inside or (np.diff(chosen) == 0).any():
            raise UserError(f"sampling.{key} must return {kept} different indices below {total}, got {chosen}")
        return chosen

    layers = choose("layers", model.n_layers, small.n_layers)
    per_group, block = model.n_heads // model.n_kv_heads, sampling.mlp_block
    heads, kv_heads, neurons = [], [], []
    for layer in layers.tolist():
        if samples_queries(model, sampling):
            groups, kept = np.arange(model.n_kv_heads), small.n_heads // model.n_kv_heads
            queries = [g * per_group + choose("heads", per_group, kept, layer, g) for g in groups.tolist()]
            heads.append(np.concatenate(queries))
        else:
            groups = choose("heads", model.n_kv_heads, small.n_kv_heads, layer)
            heads.append(_members(groups, per_group))
        kv_heads.append(groups)
        neurons.append(_members(choose("mlp", model.d_ff // block, small.d_ff // block, layer), block))
    chosen = ((heads, small.n_heads), (kv_heads, small.n_kv_heads), (neurons, small.d_ff))
    units = (np.array(rows, np.int64).reshape(len(layers), width) for rows, width in chosen)  # no layer, no row
    return Plan(layers, *units, branch_scales(shape, sampling, model.n_layers, layers))


def _members(blocks: np.ndarray, size: int) -> np.ndarray:
    """The units of contiguous blocks: block b holds b·size … b·size + size − 1."""
    return (blocks[:, None] * size + np.arange(size)).reshape(-1)


def check_strategy(config: TrainConfig) -> None:
    """Draws the first plan of every stage, so that a strategy that cannot serve its counts fails before the run begins.

    Raises UserError.
    """
    for stage in config.stages:
        sample(config.seed, stage.first_step, stage, config.model, config.sampling)
