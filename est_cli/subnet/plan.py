"""A plan: which heads, neurons and layers one optimizer step trains; and the small model that they make."""

import math
from dataclasses import dataclass, replace

import numpy as np

from est_cli.config import ModelConfig, SamplingConfig
from est_cli.subnet.schedule import Rates


def keep(rate: float, total: int) -> int:
    """How many of `total` units a rate in (0, 1] keeps: max(1, floor(rate·total + 0.5))."""
    return max(1, math.floor(rate * total + 0.5))


@dataclass(frozen=True)
class Subnetwork:
    """The shape of a sampled subnetwork: a smaller model, and the rescale (total/kept) of its parts."""

    model: ModelConfig
    head_scale: float = 1.0
    mlp_scale: float = 1.0
    layer_scale: float = 1.0


@dataclass(frozen=True)
class Plan:
    """The sampled units, sorted and unique, in the numbering of the full model.

    layers    [n]         kept layers
    heads     [n, n_heads]     query heads of each kept layer
    kv_heads  [n, n_kv_heads]  key/value heads of each kept layer
    neurons   [n, d_ff]        MLP neurons of each kept layer
    """

    layers: np.ndarray
    heads: np.ndarray
    kv_heads: np.ndarray
    neurons: np.ndarray

    def as_dict(self) -> dict[str, list]:
        return {name: getattr(self, name).tolist() for name in ("layers", "heads", "kv_heads", "neurons")}


def grouped(model: ModelConfig) -> bool:
    """Grouped-query attention: several query heads share one key/value head."""
    return model.n_kv_heads != model.n_heads


def subnetwork(model: ModelConfig, sampling: SamplingConfig, rates: Rates) -> Subnetwork:
    """The shape of every subnetwork that these rates sample; the full model where every count is full."""
    if not grouped(model):
        n_heads = n_kv_heads = keep(rates.heads, model.n_heads)
    else:
        per_group = model.n_heads // model.n_kv_heads
        if sampling.gqa == "group":
            n_kv_heads = keep(rates.heads, model.n_kv_heads)
        else:
            n_kv_heads = model.n_kv_heads
            per_group = keep(rates.heads, per_group)
        n_heads = n_kv_heads * per_group
    d_ff = keep(rates.mlp, model.d_ff // sampling.mlp_block) * sampling.mlp_block
    n_layers = keep(rates.layers, model.n_layers)
    small = replace(model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=d_ff)
    return Subnetwork(
        small,
        head_scale=model.n_heads / n_heads,
        mlp_scale=model.d_ff / d_ff,
        layer_scale=model.n_layers / n_layers if sampling.rescale_layers else 1.0,
    )


def effective_rates(model: ModelConfig, sampling: SamplingConfig, rates: Rates) -> Rates:
    """The fractions that are really kept, after rounding to whole units."""
    small = subnetwork(model, sampling, rates).model
    return Rates(small.n_heads / model.n_heads, small.d_ff / model.d_ff, small.n_layers / model.n_layers)
