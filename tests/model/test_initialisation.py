"""Initial weights: spread as the papers say, a pure function of the seed."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, GPT2, LLAMA, snapshot

from est_cli.config import ModelConfig
from est_cli.model.initialisation import initialise
from est_cli.model.transformer import Transformer

WIDE = {"n_layers": 2, "d_model": 96, "d_ff": 128, "vocab_size": 301, "max_seq_len": 100}
RULES = {
    "gpt2": (replace(GPT2, **WIDE, head_dim=24), 0.02, 0.02 / math.sqrt(4)),
    "tinyllama": (replace(LLAMA, **WIDE, head_dim=16), math.sqrt(2 / (5 * 96)), 1 / (2 * math.sqrt(96))),
}


def drawn(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return snapshot(initialise(Transformer(config), seed))


@pytest.mark.parametrize("rule", RULES)
def test_matrices_are_normal_with_the_rules_deviation(rule):
    config, ordinary, residual = RULES[rule]
    for name, tensor in drawn(config).items():
        if tensor.dim() < 2:
            continue
        expected = residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else ordinary
        # Five standard errors of a sample deviation, and of a sample mean.
        assert tensor.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * tensor.numel())), name
        assert abs(tensor.mean().item()) < 5 * expected / math.sqrt(tensor.numel()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_start_at_zero_and_norms_at_one(family):
    vectors = {name: tensor for name, tensor in drawn(FAMILIES[family]).items() if tensor.dim() == 1}
    assert any("norm" in name for name in vectors)
    for name, tensor in vectors.items():
        assert (tensor == (0.0 if name.endswith(".bias") else 1.0)).all(), name


def test_every_parameter_is_filled():
    model = Transformer(LLAMA)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    assert all(parameter.isfinite().all() for parameter in initialise(model, 0).parameters())


def test_weights_depend_on_the_seed_alone():
    first = drawn(LLAMA, 3)
    torch.manual_seed(17)
    again, other = drawn(LLAMA, 3), drawn(LLAMA, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if first[name].dim() > 1)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn(LLAMA)
    assert torch.equal(torch.rand(3), expected)
