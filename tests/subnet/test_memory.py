"""Parameter counts and the memory estimate."""

from dataclasses import replace
from functools import cache

import pytest
from test_conf import OPTIONS, read
from tiny import FAMILIES, LLAMA

from est_cli.config import ModelConfig
from est_cli.model.transformer import Transformer
from est_cli.subnet.memory import Ranks, checkpoint_bytes, count_parameters, sent_bytes, training_bytes

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
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.blocks == sum(parameter.numel() for parameter in model.blocks.parameters())
    assert count.norm == sum(parameter.numel() for parameter in model.norm.parameters())
    assert count.matrices == sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert count.block_matrices == sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert count.total == pytest.approx(PUBLISHED.get(name, count.total), rel=0.01)


def test_a_checkpoint_holds_the_weights_and_two_moments():
    total = count_parameters(LLAMA).total
    assert checkpoint_bytes(LLAMA) == (4 * total, 12 * total)


def test_the_estimate_is_of_the_costliest_stage():
    half = replace(LLAMA, n_layers=1, d_ff=8)

    def estimate(*stages: ModelConfig, batch_size: int = 4, **options: int) -> int:
        flags = {"bf16": False, "recompute": False, "cpu": True, **options}
        return training_bytes(LLAMA, stages, batch_size, 16, **flags)

    assert estimate(half, LLAMA) == estimate(LLAMA, half) == max(estimate(half), estimate(LLAMA))
    assert estimate(LLAMA, batch_size=400) > estimate(LLAMA)
    assert estimate(LLAMA, batch_size=400, recompute=True) < estimate(LLAMA, batch_size=400)
    for bf16 in (False, True):
        two, four = (estimate(half, bf16=bf16, ranks=Ranks(4, shards)) for shards in (2, 4))
        shared = 12 * count_parameters(LLAMA).matrices + 4 * (count_parameters(half).matrices - 2 * 29 * 12)
        assert two - four == shared / 4, "masters, two moments and slots"


MEASURED = [
    (2, 1, False, 2031), (2, 2, False, 1526), (4, 4, False, 1210), (2, 2, True, 1382), (2, 1, True, 1871),
]  # fmt: skip
"""Ranks, how many share the masters, bf16, and the peak in MiB: docs/performance.md has the command."""


@pytest.mark.parametrize(("ranks", "shards", "bf16", "mebibytes"), MEASURED)
def test_the_estimate_of_ranks_is_near_what_was_measured(ranks, shards, bf16, mebibytes):
    full = replace(shipped("gpt2"), n_layers=6)
    half = replace(full, n_heads=6, n_kv_heads=6, d_ff=1536)
    stages = (replace(half, n_layers=3), half, full)
    estimate = training_bytes(full, stages, 1, 64, bf16, False, True, Ranks(ranks, shards))
    assert estimate == pytest.approx(mebibytes * 2**20, rel=0.15)


def test_a_device_sends_what_its_ring_carries():
    """Llama 7B on 64 devices in bf16: ddp all-reduces fp32 gradients, fsdp gathers bf16 twice and reduces fp32."""
    count = count_parameters(shipped("llama_7b"))
    ddp, fsdp, hsdp = (sent_bytes(shipped("llama_7b"), Ranks(64, shards), True) for shards in (1, 64, 8))
    assert ddp == pytest.approx(8 * count.total * 63 / 64, rel=1e-3)
    assert fsdp == pytest.approx((2 * 2 + 4) * count.total * 63 / 64, rel=0.02), "the tables once"
    assert ddp > hsdp > fsdp
    assert sent_bytes(shipped("llama_7b"), Ranks(64, 64), True, grad_accum=2) > 1.4 * fsdp
