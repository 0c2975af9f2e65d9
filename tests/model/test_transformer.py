"""The decoder and its initial weights.

That it is GPT-2 and Llama, test_huggingface.py shows; that a packed one with its rescales is the paper's subnetwork,
training/test_equivalence.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, GPT2, LLAMA, random_batch, random_master, snapshot

from est_cli.config import ModelConfig
from est_cli.model.transformer import Transformer, initialise, rope_tables


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_runs_every_block_twice_and_changes_no_gradient(family):
    gradients, runs = [], []
    for recompute in (False, True):
        model = random_master(FAMILIES[family])
        model.recompute = recompute
        for block in model.blocks:
            block.mlp.register_forward_hook(lambda *_: runs.append(recompute))  # noqa: B023
        model(*random_batch(FAMILIES[family])).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert runs.count(True) == 2 * runs.count(False) == 2 * model.config.n_layers


def test_a_short_batch_after_a_long_one_rotates_as_before():
    model = random_master(LLAMA)
    short, long = random_batch(LLAMA, length=3)[0], random_batch(LLAMA, length=9)[0]
    with torch.no_grad():
        expected = model.logits(short)
        model.logits(long)
        assert torch.equal(model.logits(short), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-4)])
def test_rotary_angles_are_as_exact_as_the_dtype_allows(dtype, tolerance):
    cosine, sine = rope_tables(LLAMA, 1000, None, dtype)
    for feature in range(LLAMA.head_dim // 2):
        angles = [t * LLAMA.rope_theta ** (-2 * feature / LLAMA.head_dim) for t in range(1000)]
        expected = torch.tensor(angles, dtype=torch.float64)
        torch.testing.assert_close(cosine[:, 0, feature].double(), expected.cos(), rtol=0, atol=tolerance)
        torch.testing.assert_close(sine[:, 0, feature].double(), expected.sin(), rtol=0, atol=tolerance)


def drawn(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Initial weights in the place of NaN, so that a parameter that is not filled shows."""
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    return snapshot(initialise(model, seed))


WIDE = {"n_layers": 2, "d_model": 96, "d_ff": 128, "vocab_size": 301, "max_seq_len": 100}
RULES = {
    "gpt2": (replace(GPT2, **WIDE, head_dim=24), 0.02, 0.02 / math.sqrt(4)),
    "tinyllama": (replace(LLAMA, **WIDE, head_dim=16), math.sqrt(2 / (5 * 96)), 1 / (2 * math.sqrt(96))),
}


@pytest.mark.parametrize("rule", RULES)
def test_matrices_start_normal_with_the_rules_deviation_biases_at_zero_and_norms_at_one(rule):
    config, ordinary, residual = RULES[rule]
    for name, tensor in drawn(config).items():
        if tensor.dim() < 2:
            assert (tensor == (0.0 if name.endswith(".bias") else 1.0)).all(), name
            continue
        expected = residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else ordinary
        # Five standard errors of a sample deviation, and of a sample mean.
        assert tensor.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * tensor.numel())), name
        assert abs(tensor.mean().item()) < 5 * expected / math.sqrt(tensor.numel()), name


def test_weights_depend_on_the_seed_only_and_leave_the_global_generator_alone():
    torch.manual_seed(17)
    expected = torch.rand(3)
    first = drawn(LLAMA, 3)
    torch.manual_seed(17)
    again, other = drawn(LLAMA, 3), drawn(LLAMA, 4)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if first[name].dim() > 1)
