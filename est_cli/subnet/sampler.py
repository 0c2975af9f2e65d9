"""The sampler: a plan is a pure function of the seed, the step, the stage and the sizes.

Indices are the ranks of raw Philox words (Salmon et al., 2011) under a key that says what is drawn, so that
they need no state, no global generator, and survive upgrades of every library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from est_cli.config import ModelConfig, SamplingConfig, named_function
from est_cli.subnet.plan import Plan, grouped, subnetwork
from est_cli.subnet.schedule import Stage

DIMENSIONS = ("heads", "mlp", "layers")


@dataclass(frozen=True)
class Draw:
    """What is drawn: the key of one choice of `kept` units out of `total`.

    `number` counts the draws of a stage (every `resample_every` steps makes a new one), `group` is the
    key/value group for query heads and 0 elsewhere.
    """

    seed: int
    stage_start: int
    number: int
    layer: int
    dimension: str
    group: int = 0

    def words(self, n: int) -> np.ndarray:
        """`n` random 64-bit words that depend on this key alone."""
        where = (self.layer << 32) | (self.group << 8) | DIMENSIONS.index(self.dimension)
        generator = np.random.Philox(
            key=np.array([self.seed, 0], dtype=np.uint64),
            counter=np.array([0, self.number, self.stage_start, where], dtype=np.uint64),
        )
        return generator.random_raw(n)


Strategy = Callable[[Draw, int, int], np.ndarray]


def random(draw: Draw, total: int, kept: int) -> np.ndarray:
    """Uniform, without replacement: the paper's sampling."""
    return np.argsort(draw.words(total), kind="stable")[:kept]


def prefix(draw: Draw, total: int, kept: int) -> np.ndarray:
    """Always the first units: nested subnetworks."""
    return np.arange(kept)


STRATEGIES: dict[str, Strategy] = {"random": random, "prefix": prefix}


def sample(
    seed: int, step: int, stage: Stage, model: ModelConfig, sampling: SamplingConfig, strategy: Strategy = random
) -> Plan:
    """The plan of optimizer step `step`, which lies in `stage`."""
    small = subnetwork(model, sampling, stage.rates).model
    number = (step - stage.first_step) // sampling.resample_every

    def choose(dimension: str, total: int, kept: int, layer: int = 0, group: int = 0) -> np.ndarray:
        if kept == total:
            return np.arange(total)
        draw = Draw(seed, stage.first_step, number, layer, dimension, group)
        chosen = np.sort(np.asarray(strategy(draw, total, kept)))
        if chosen.shape != (kept,) or chosen[0] < 0 or chosen[-1] >= total or (np.diff(chosen) == 0).any():
            raise ValueError(f"sampling.strategy must return {kept} different indices below {total}, got {chosen}")
        return chosen

    layers = choose("layers", model.n_layers, small.n_layers)
    heads, kv_heads, neurons = [], [], []
    for layer in layers.tolist():
        query, key_value = _choose_heads(model, small, sampling, partial(choose, "heads", layer=layer))
        heads.append(query)
        kv_heads.append(key_value)
        blocks = choose("mlp", model.d_ff // sampling.mlp_block, small.d_ff // sampling.mlp_block, layer)
        neurons.append(_members(blocks, sampling.mlp_block))
    return Plan(layers, np.stack(heads), np.stack(kv_heads), np.stack(neurons))


def _choose_heads(
    model: ModelConfig, small: ModelConfig, sampling: SamplingConfig, choose: Callable[..., np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Query and key/value heads of one layer; `choose(total, kept, group=…)` draws."""
    per_group = model.n_heads // model.n_kv_heads
    if not grouped(model) or sampling.gqa == "group":
        groups = choose(model.n_kv_heads, small.n_kv_heads)
        return _members(groups, per_group), groups
    kept = small.n_heads // model.n_kv_heads
    query = [group * per_group + choose(per_group, kept, group=group) for group in range(model.n_kv_heads)]
    return np.concatenate(query), np.arange(model.n_kv_heads)


def _members(blocks: np.ndarray, size: int) -> np.ndarray:
    """The units of contiguous blocks: block b holds b·size … b·size + size − 1."""
    return (blocks[:, None] * size + np.arange(size)).reshape(-1)


def strategy_named(name: str) -> Strategy:
    """A strategy by its name, or what a dotted path imports. Raises UserError."""
    return named_function(name, STRATEGIES, "sampling.strategy")
