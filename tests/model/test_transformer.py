"""A packed subnetwork is the decoder with fewer units. That it is GPT-2 and Llama, test_huggingface.py shows."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tiny import FAMILIES, GPT2, LLAMA, random_batch, random_master
from torch import Tensor

from est_cli.model.transformer import ResidualOutput, Transformer, layer_of, rope_tables, row_kind
from est_cli.subnet.plan import Subnetwork


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_blocks_changes_no_gradient(family):
    inputs, targets = random_batch(FAMILIES[family])
    gradients = []
    for recompute in (False, True):
        model = random_master(FAMILIES[family])
        model.recompute = recompute
        model(inputs, targets).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_recomputing_runs_every_block_twice():
    model, runs = random_master(LLAMA), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: runs.append(1))
    model.recompute = True
    model(*random_batch(LLAMA)).backward()
    assert len(runs) == 2 * LLAMA.n_layers


def sliced(model: Transformer, layers: list[int], heads: list[int], neurons: list[int]) -> Transformer:
    """A GPT-2 cut by hand to the same heads and neurons in each of its kept layers."""
    full = model.config
    small = replace(full, n_layers=len(layers), n_heads=len(heads), n_kv_heads=len(heads), d_ff=len(neurons))
    scales = {"head_scale": full.n_heads / len(heads), "mlp_scale": full.d_ff / len(neurons)}
    cut = Transformer(Subnetwork(small, **scales, scales_layers=True), dtype=torch.float64)
    for block in cut.blocks:
        block.scales = 1.5 * torch.tensor(list(scales.values()), dtype=torch.float64)
    state = dict(model.named_parameters())
    for name, parameter in cut.named_parameters():
        tensor = state[name]
        if name.startswith("blocks."):
            _, position, rest = name.split(".", 2)
            tensor = state[f"blocks.{layers[int(position)]}.{rest}"]
            if rest.startswith("attention.qkv"):
                tensor = tensor.unflatten(0, (3, full.n_heads, full.head_dim))[:, heads].flatten(0, 2)
            elif rest == "attention.out.weight":
                tensor = tensor.unflatten(0, (full.n_heads, full.head_dim))[heads].flatten(0, 1)
            elif rest.startswith("mlp.up") or rest == "mlp.down.weight":
                tensor = tensor[neurons]
        parameter.data = tensor.data.clone()
    return cut


def test_a_sliced_model_is_the_full_one_with_its_other_outputs_zeroed_and_the_rest_rescaled():
    full, layers, heads, neurons = random_master(GPT2), [0, 2], [1, 3], [0, 5, 6, 11]
    cut, inputs = sliced(full, layers, heads, neurons), random_batch(GPT2)[0]
    with torch.no_grad():
        for index, block in enumerate(full.blocks):
            attention, mlp = block.attention.out, block.mlp.down
            kept_heads, kept_neurons = torch.zeros(4, 1, 1), torch.zeros(16, 1)
            kept_heads[heads], kept_neurons[neurons] = 4 / 2, 16 / 4
            layer = 1.5 if index in layers else 0.0
            attention.weight.copy_((attention.weight.view(4, 3, 12) * kept_heads * layer).view(12, 12))
            mlp.weight.copy_(mlp.weight * kept_neurons * layer)
            attention.bias.mul_(layer)
            mlp.bias.mul_(layer)
        torch.testing.assert_close(cut.logits(inputs), full.logits(inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 6])
def test_rescaled_outputs_average_to_the_full_output(kept):
    """Over all subsets of one linear output projection; the bias, added after the rescale, stays itself."""
    torch.manual_seed(0)
    weight, bias, x, residual = torch.randn(6, 4), torch.randn(4), torch.randn(3, 6), torch.randn(3, 4)

    def output(rows: list[int]) -> Tensor:
        projection = ResidualOutput(len(rows), 4, bias=True)
        projection.weight.data, projection.bias.data = weight[rows], bias
        return projection(x[:, rows], residual, 6 / len(rows), torch.tensor(6 / len(rows)))

    with torch.no_grad():
        subsets = [output(list(rows)) for rows in combinations(range(6), kept)]
        expected = residual + x @ weight + bias
    torch.testing.assert_close(sum(subsets) / len(subsets), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_do_not_reach_earlier_positions(family):
    model, inputs = random_master(FAMILIES[family]), random_batch(FAMILIES[family])[0]
    changed = inputs.clone()
    changed[:, 3] = (changed[:, 3] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model.logits(inputs), model.logits(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-12)
    assert (before[:, 3:] - after[:, 3:]).abs().amax(dim=-1).min() > 1e-6


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


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("blocks.11.attention.qkv.bias", "qkv", 11),
        ("blocks.0.attention.out.weight", "heads", 0),
        ("blocks.0.attention.out.bias", None, 0),
        ("blocks.3.mlp.up.weight", "up", 3),
        ("blocks.3.mlp.down.weight", "neurons", 3),
        ("blocks.3.mlp.down.bias", None, 3),
        ("blocks.3.norm1.weight", None, 3),
        ("embedding", None, None),
        ("norm.weight", None, None),
    ],
)
def test_a_parameters_name_says_what_of_it_is_sampled(name, kind, layer):
    assert (row_kind(name), layer_of(name)) == (kind, layer)
