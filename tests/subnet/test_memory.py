"""Parameter counts and the memory estimate."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from test_conf import OPTIONS, read
from tiny import FAMILIES, FULL, LLAMA, train_config

from est_cli.config import ModelConfig
from est_cli.model.transformer import Transformer
from est_cli.subnet.memory import checkpoint_bytes, count_parameters, sent_bytes, training_bytes
from est_cli.subnet.schedule import StageSpec

MODELS = [option for group, option in OPTIONS if group == "model"]
PUBLISHED = {"gpt2": 124e6, "gpt2_medium": 355e6, "gpt2_large": 774e6, "gpt2_xl": 1.56e9, "tinyllama": 1.1e9,
             "llama_7b": 6.74e9, "llama_13b": 13.02e9}  # fmt: skip
"""Radford et al. (2019), Zhang et al. (2024) and Touvron et al. (2023)."""
SETTINGS = {
    f"{family}, {tied=}, {bias=}": replace(FAMILIES[family], tie_embeddings=tied, bias=bias, head_dim=5)
    for family in FAMILIES
    for tied in (True, False)
    for bias in (True, False)
}


@cache
def shipped(name: str) -> ModelConfig:
    return read(f"model={name}").model


@pytest.mark.parametrize("name", dict.fromkeys([*MODELS, *PUBLISHED, *SETTINGS]))
def test_the_count_is_that_of_the_model_that_is_built(name):
    config = SETTINGS.get(name) or shipped(name)
    model, count = Transformer(config, device="meta"), count_parameters(config)

    def built(module: torch.nn.Module, fewest_dimensions: int = 1) -> int:
        return sum(p.numel() for p in module.parameters() if p.dim() >= fewest_dimensions)

    assert (count.total, count.blocks, count.norm) == (built(model), built(model.blocks), built(model.norm))
    assert (count.matrices, count.block_matrices) == (built(model, 2), built(model.blocks, 2))
    assert count.total == pytest.approx(PUBLISHED.get(name, count.total), rel=0.01)
    assert checkpoint_bytes(config) == (4 * count.total, 12 * count.total), "the weights, and with two moments"


def test_the_estimate_is_of_the_costliest_stage():
    half = StageSpec(0.5, mlp=0.5, n_layers=1)

    def estimate(*stages: StageSpec, batch_size: int = 4, **trainer) -> int:
        return training_bytes(train_config(stages=stages, batch_size=batch_size, **trainer))

    both = estimate(half, StageSpec())
    assert both == max(estimate(replace(half, end=None)), estimate(*FULL))
    assert estimate(*FULL, batch_size=400) > both
    assert estimate(*FULL, batch_size=400, recompute="block") < estimate(*FULL, batch_size=400)
    small = count_parameters(replace(LLAMA, n_layers=1, d_ff=8))
    shared = 12 * count_parameters(LLAMA).matrices + 4 * (small.matrices - 2 * 29 * 12)
    for precision in ("fp32", "bf16"):
        ranks = {"strategy": "hsdp", "devices": 4, "precision": precision}
        two, four = (estimate(replace(half, end=None), **ranks, shard_size=shards) for shards in (2, 4))
        assert two - four == shared / 4, "masters, two moments and slots"


MEASURED = [
    (2, 1, "fp32", 2031), (2, 2, "fp32", 1526), (4, 4, "fp32", 1210), (2, 2, "bf16", 1382), (2, 1, "bf16", 1871),
]  # fmt: skip
"""Ranks, how many share the masters, and the peak in MiB: docs/performance.md has the command."""


@pytest.mark.parametrize(("ranks", "shards", "precision", "mebibytes"), MEASURED)
def test_the_estimate_of_ranks_is_near_what_was_measured(ranks, shards, precision, mebibytes):
    trainer = {"batch_size": 1, "strategy": "hsdp", "devices": ranks, "shard_size": shards, "precision": precision}
    config = train_config(replace(shipped("gpt2"), n_layers=6), seq_len=64, **trainer)
    assert training_bytes(config) == pytest.approx(mebibytes * 2**20, rel=0.15)


def test_a_device_sends_what_its_ring_carries():
    """Llama 7B on 64 devices in bf16: ddp all-reduces fp32 gradients, fsdp gathers bf16 twice and reduces fp32."""
    total = count_parameters(shipped("llama_7b")).total

    def sent(shards: int, **trainer: int) -> int:
        trainer |= {"devices": 64, "shard_size": shards, "precision": "bf16"}
        config = train_config(shipped("llama_7b"), stages=FULL, **trainer)
        return sent_bytes(config, config.stages[0])

    assert sent(1) == pytest.approx(8 * total * 63 / 64, rel=1e-3)
    assert sent(64) == pytest.approx((2 * 2 + 4) * total * 63 / 64, rel=0.02), "the tables once"
    assert sent(1) > sent(8) > sent(64)
    assert sent(64, grad_accum=2) > 1.4 * sent(64)
