"""Which rows of a parameter belong to a plan.

Every parameter that is sampled inside a layer is a matrix of rows, neuron-major, so that a sampled row is
contiguous. A row is what one unit owns: head_dim rows of a projection, one row of an MLP matrix.

kind      rows                       unit
qkv       H query, K key, K value    heads, key/value heads
heads     H                          heads (the attention's output projection)
up        F, or F gate and F up      neurons (shared by gate and up)
neurons   F                          neurons (the MLP's output projection)
"""

from typing import Literal

import numpy as np

from est_cli.config import ModelConfig
from est_cli.subnet.plan import Plan

RowKind = Literal["qkv", "heads", "up", "neurons"]


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
