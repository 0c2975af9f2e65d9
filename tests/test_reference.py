"""The reference agrees with sources that know nothing of it: transformers, torch.optim, and its own algebra."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from reference import (
    ReferenceAdamW,
    ReferencePlan,
    Sizes,
    attention,
    clip,
    full_plan,
    logits,
    loss,
    loss_and_gradients,
    mlp,
    sampled_rows,
    shapes,
)
from torch import Tensor

GPT2 = Sizes(
    n_layers=3,
    n_heads=4,
    n_kv_heads=4,
    head_dim=2,
    d_model=8,
    d_ff=6,
    vocab_size=11,
    max_seq_len=7,
    norm="layernorm",
    position="learned",
    mlp="gelu",
    bias=True,
    tied=True,
    norm_eps=1e-5,
)
LLAMA = replace(
    GPT2,
    n_kv_heads=2,
    head_dim=4,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    bias=False,
    tied=False,
    norm_eps=1e-6,
    rope_theta=500.0,
)
MIXED = replace(GPT2, n_kv_heads=2, head_dim=4, norm="rmsnorm", position="rope", tied=False)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "mixed": MIXED}
# eps is large because GPT-2's key bias has a true gradient of 0: Adam would blow its rounding noise up to lr * 1e-9.
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
MAX_NORM = 0.5


def random_parameters(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Every parameter away from 0 and 1, biases and norms too, so that dropping one shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64) + ("norm" in name and "weight" in name)
        for name, shape in shapes(sizes).items()
    }


def random_batch(sizes: Sizes, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(sizes.vocab_size, (2, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def random_hidden(sizes: Sizes) -> Tensor:
    return torch.randn(2, 5, sizes.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient_is_truly_zero(sizes: Sizes, name: str) -> bool:
    """A key bias that no rotation follows shifts all scores of a query alike, and softmax does not see it."""
    return sizes.position == "learned" and name.endswith("k.bias")


def random_plan(sizes: Sizes, seed: int, gqa: str = "group") -> ReferencePlan:
    """Half of the layers, of the neurons, and of the heads: whole key/value groups, or half of every group."""
    chance = random.Random(seed)

    def half(units: int) -> list[int]:
        return sorted(chance.sample(range(units), max(1, math.floor(0.5 * units + 0.5))))

    group = sizes.heads_per_kv_head
    plan = ReferencePlan(layers=half(sizes.n_layers), heads={}, kv_heads={}, neurons={})
    for layer in plan.layers:
        kept = half(sizes.n_kv_heads) if gqa == "group" else list(range(sizes.n_kv_heads))
        plan.kv_heads[layer] = kept
        plan.heads[layer] = [kv * group + i for kv in kept for i in (range(group) if gqa == "group" else half(group))]
        plan.neurons[layer] = half(sizes.d_ff)
    return plan


def matrices(sizes: Sizes) -> set[str]:
    """What a real run decays: matrices and embeddings, no bias (a head's bias is not a matrix) and no norm."""
    return {name for name in shapes(sizes) if not name.endswith(".bias") and "norm" not in name}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        difference = (found[name] - expected[name]).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        shift = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.4 * values + shift
    return model.eval()


def textbook_from_gpt2(sizes: Sizes, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers stores GPT-2's linear layers input-major (Conv1D), with q, k and v side by side."""
    D, H, E = sizes.d_model, sizes.n_heads, sizes.head_dim
    out = {"embedding": tensors["transformer.wte.weight"], "positions": tensors["transformer.wpe.weight"]}
    if not sizes.tied:
        out["head"] = tensors["lm_head.weight"]
    for kind in ("weight", "bias"):
        out[f"final_norm.{kind}"] = tensors[f"transformer.ln_f.{kind}"]
        for layer in range(sizes.n_layers):
            block = f"transformer.h.{layer}"
            out[f"{layer}.norm1.{kind}"] = tensors[f"{block}.ln_1.{kind}"]
            out[f"{layer}.norm2.{kind}"] = tensors[f"{block}.ln_2.{kind}"]
            fused = tensors[f"{block}.attn.c_attn.{kind}"]
            for i, name in enumerate("qkv"):
                part = fused[..., i * H * E : (i + 1) * H * E]
                out[f"{layer}.{name}.{kind}"] = part.T.reshape(H, E, D) if kind == "weight" else part.reshape(H, E)
            up, down = tensors[f"{block}.mlp.c_fc.{kind}"], tensors[f"{block}.mlp.c_proj.{kind}"]
            output = tensors[f"{block}.attn.c_proj.{kind}"]
            out[f"{layer}.up.{kind}"] = up.T if kind == "weight" else up
            out[f"{layer}.down.{kind}"] = down
            out[f"{layer}.o.{kind}"] = output.reshape(H, E, D) if kind == "weight" else output
    return out


def textbook_from_llama(sizes: Sizes, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    D, H, K, E = sizes.d_model, sizes.n_heads, sizes.n_kv_heads, sizes.head_dim
    out = {"embedding": tensors["model.embed_tokens.weight"], "final_norm.weight": tensors["model.norm.weight"]}
    if not sizes.tied:
        out["head"] = tensors["lm_head.weight"]
    for layer in range(sizes.n_layers):
        block = f"model.layers.{layer}"
        out[f"{layer}.norm1.weight"] = tensors[f"{block}.input_layernorm.weight"]
        out[f"{layer}.norm2.weight"] = tensors[f"{block}.post_attention_layernorm.weight"]
        for name, heads in (("q", H), ("k", K), ("v", K)):
            out[f"{layer}.{name}.weight"] = tensors[f"{block}.self_attn.{name}_proj.weight"].reshape(heads, E, D)
            if sizes.bias:
                out[f"{layer}.{name}.bias"] = tensors[f"{block}.self_attn.{name}_proj.bias"].reshape(heads, E)
        out[f"{layer}.o.weight"] = tensors[f"{block}.self_attn.o_proj.weight"].T.reshape(H, E, D)
        out[f"{layer}.gate.weight"] = tensors[f"{block}.mlp.gate_proj.weight"]
        out[f"{layer}.up.weight"] = tensors[f"{block}.mlp.up_proj.weight"]
        out[f"{layer}.down.weight"] = tensors[f"{block}.mlp.down_proj.weight"].T
        if sizes.bias:
            out[f"{layer}.o.bias"] = tensors[f"{block}.self_attn.o_proj.bias"]
            for name in ("gate", "up", "down"):
                out[f"{layer}.{name}.bias"] = tensors[f"{block}.mlp.{name}_proj.bias"]
    return out


class _TorchWithoutFloat32:
    """transformers computes Llama's norm, softmax and rotary angles in float32 whatever the model's dtype is."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def transformers_gpt2(sizes: Sizes) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=sizes.n_layers,
        n_head=sizes.n_heads,
        n_embd=sizes.d_model,
        n_inner=sizes.d_ff,
        vocab_size=sizes.vocab_size,
        n_positions=sizes.max_seq_len,
        layer_norm_epsilon=sizes.norm_eps,
        tie_word_embeddings=sizes.tied,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return randomize(transformers.GPT2LMHeadModel(config).double())


def transformers_llama(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.torch", _TorchWithoutFloat32())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = transformers.LlamaConfig(
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        head_dim=sizes.head_dim,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_ff,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_seq_len,
        rms_norm_eps=sizes.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        attention_bias=sizes.bias,
        mlp_bias=sizes.bias,
        tie_word_embeddings=sizes.tied,
        attn_implementation="eager",
    )
    return randomize(transformers.LlamaForCausalLM(config).double())


def assert_same_as_transformers(sizes: Sizes, model: torch.nn.Module, textbook: Callable) -> None:
    """Logits, loss, and every gradient."""
    inputs, targets = random_batch(sizes)
    theirs = model(input_ids=inputs).logits
    their_loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    their_loss.backward()
    weights = textbook(sizes, {name: parameter.detach() for name, parameter in model.named_parameters()})
    ours, gradients = loss_and_gradients(sizes, weights, full_plan(sizes), inputs, targets, rescale_layers=True)

    assert theirs.dtype == torch.float64
    torch.testing.assert_close(logits(sizes, weights, full_plan(sizes), inputs), theirs.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(ours, their_loss.detach(), rtol=0, atol=1e-10)
    assert_equal(gradients, textbook(sizes, {name: p.grad for name, p in model.named_parameters()}), 1e-10)


@pytest.mark.parametrize("tied", [True, False])
def test_full_plan_is_transformers_gpt2(tied):
    sizes = replace(GPT2, tied=tied)
    assert_same_as_transformers(sizes, transformers_gpt2(sizes), textbook_from_gpt2)


@pytest.mark.parametrize(("tied", "bias", "n_kv_heads"), [(False, False, 2), (True, True, 1), (False, True, 4)])
def test_full_plan_is_transformers_llama(tied, bias, n_kv_heads, monkeypatch):
    sizes = replace(LLAMA, tied=tied, bias=bias, n_kv_heads=n_kv_heads)
    assert_same_as_transformers(sizes, transformers_llama(sizes, monkeypatch), textbook_from_llama)


def small_dense_model(
    sizes: Sizes, parameters: dict[str, Tensor], plan: ReferencePlan, rescale_layers: bool
) -> tuple[Sizes, dict[str, Tensor]]:
    """The subnetwork as a full model of its own: kept rows cut out, every rescale folded into the output weights."""
    first = plan.layers[0]
    small_sizes = replace(
        sizes,
        n_layers=len(plan.layers),
        n_heads=len(plan.heads[first]),
        n_kv_heads=len(plan.kv_heads[first]),
        d_ff=len(plan.neurons[first]),
    )
    branch = sizes.n_layers / len(plan.layers) if rescale_layers else 1.0
    small = {name: tensor for name, tensor in parameters.items() if not name[0].isdigit()}
    for new, old in enumerate(plan.layers):
        rows = {"q": plan.heads[old], "o": plan.heads[old], "k": plan.kv_heads[old], "v": plan.kv_heads[old]}
        rows |= dict.fromkeys(("up", "gate", "down"), plan.neurons[old])
        totals = {"o": sizes.n_heads / len(plan.heads[old]), "down": sizes.d_ff / len(plan.neurons[old])}
        for name, tensor in parameters.items():
            layer, module, kind = name.split(".") if name[0].isdigit() else ("", "", "")
            if layer != str(old):
                continue
            output = module in totals
            part = tensor if "norm" in module or (output and kind == "bias") else tensor[rows[module]]
            scale = branch * (totals[module] if kind == "weight" else 1.0) if output else 1.0
            small[f"{new}.{module}.{kind}"] = scale * part
    return small_sizes, small


@pytest.mark.parametrize("rescale_layers", [False, True])
@pytest.mark.parametrize("gqa", ["group", "query"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_is_the_small_dense_model_with_the_rescales_in_its_output_weights(family, gqa, rescale_layers):
    sizes, seed = FAMILIES[family], 3
    parameters, plan = random_parameters(sizes), random_plan(sizes, seed, gqa)
    inputs, targets = random_batch(sizes)
    small_sizes, small = small_dense_model(sizes, parameters, plan, rescale_layers)
    ours = loss(sizes, parameters, plan, inputs, targets, rescale_layers)
    theirs = loss(small_sizes, small, full_plan(small_sizes), inputs, targets, rescale_layers=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert abs(ours - loss(sizes, parameters, full_plan(sizes), inputs, targets, rescale_layers)) > 1e-3


def test_rescale_layers_changes_a_plan_without_all_layers():
    parameters, plan = random_parameters(GPT2), random_plan(GPT2, 3)
    inputs, targets = random_batch(GPT2)
    assert len(plan.layers) < GPT2.n_layers
    with_rescale, without = (loss(GPT2, parameters, plan, inputs, targets, flag) for flag in (True, False))
    assert abs(with_rescale - without) > 1e-3


@pytest.mark.parametrize("gqa", ["group", "query"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_sampled_rows_get_gradients(family, gqa):
    sizes = FAMILIES[family]
    plan = random_plan(sizes, 5, gqa)
    inputs, targets = random_batch(sizes)
    _, gradients = loss_and_gradients(sizes, random_parameters(sizes), plan, inputs, targets, False)
    skipped = {str(layer) for layer in range(sizes.n_layers)} - {str(layer) for layer in plan.layers}
    assert skipped
    for name, gradient in gradients.items():
        sampled = sampled_rows(name, plan)
        if name.split(".")[0] in skipped:
            assert sampled == []
            assert not gradient.any(), name
            continue
        assert sampled, name
        if sampled == [...]:
            assert gradient.any(), name
            continue
        for row in range(len(gradient)):
            if row not in sampled:
                assert not gradient[row].any(), (name, row)
            elif not gradient_is_truly_zero(sizes, name):
                assert gradient[row].abs().max() > 1e-9, (name, row)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_do_not_reach_earlier_positions(family):
    sizes = FAMILIES[family]
    parameters, plan = random_parameters(sizes), random_plan(sizes, 2)
    inputs, _ = random_batch(sizes)
    changed = inputs.clone()
    changed[:, 3] = (changed[:, 3] + 1) % sizes.vocab_size
    before, after = (logits(sizes, parameters, plan, tokens) for tokens in (inputs, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().amax(dim=-1).min() > 1e-6


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_rescaled_attention_outputs_average_to_the_full_one(family, kept):
    sizes = FAMILIES[family]
    parameters, x = random_parameters(sizes), random_hidden(sizes)
    subsets = [list(heads) for heads in combinations(range(sizes.n_heads), kept)]
    mean = sum(attention(sizes, parameters, 0, heads, x) for heads in subsets) / len(subsets)
    full = attention(sizes, parameters, 0, list(range(sizes.n_heads)), x)
    assert len(subsets) == math.comb(sizes.n_heads, kept)
    assert full.abs().max() > 0.1
    torch.testing.assert_close(mean, full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rescaled_mlp_outputs_average_to_the_full_one(family, kept):
    sizes = FAMILIES[family]
    parameters, x = random_parameters(sizes), random_hidden(sizes)
    subsets = [list(neurons) for neurons in combinations(range(sizes.d_ff), kept)]
    mean = sum(mlp(sizes, parameters, 0, neurons, x) for neurons in subsets) / len(subsets)
    full = mlp(sizes, parameters, 0, list(range(sizes.d_ff)), x)
    assert len(subsets) == math.comb(sizes.d_ff, kept)
    assert full.abs().max() > 0.1
    torch.testing.assert_close(mean, full, rtol=0, atol=1e-6)


def train(sizes: Sizes, plans: list[ReferencePlan], unsampled: str) -> dict[str, Tensor]:
    """Some steps of the reference optimizer with a moving learning rate."""
    parameters = random_parameters(sizes)
    optimizer = ReferenceAdamW(parameters, **ADAMW, decayed=matrices(sizes), unsampled=unsampled)
    for step, plan in enumerate(plans):
        optimizer.lr = ADAMW["lr"] / (1 + step)
        _, gradients = loss_and_gradients(sizes, parameters, plan, *random_batch(sizes, step), False)
        clip(gradients, MAX_NORM)
        optimizer.step(gradients, plan, sizes)
    return parameters


def train_with_torch(sizes: Sizes, plans: list[ReferencePlan], unsampled: str) -> dict[str, Tensor]:
    """The same with torch.optim.AdamW, which skips a tensor without a gradient and counts steps per tensor.

    So one tensor per row, with `.grad = None` where `freeze` leaves it out, is `freeze`.
    """
    everything = full_plan(sizes)
    rows = {
        (name, row): tensor[row].clone().requires_grad_()
        for name, tensor in random_parameters(sizes).items()
        for row in sampled_rows(name, everything)
    }
    decay = [tensor for (name, _), tensor in rows.items() if name in matrices(sizes)]
    keep = [tensor for (name, _), tensor in rows.items() if name not in matrices(sizes)]
    options = {**ADAMW, "foreach": False}
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": keep, "weight_decay": 0.0}], **options)

    def assemble() -> dict[str, Tensor]:
        return {
            name: rows[name, ...] if (name, ...) in rows else torch.stack([rows[name, i] for i in range(shape[0])])
            for name, shape in shapes(sizes).items()
        }

    for step, plan in enumerate(plans):
        for group in optimizer.param_groups:
            group["lr"] = ADAMW["lr"] / (1 + step)
        optimizer.zero_grad(set_to_none=True)
        loss(sizes, assemble(), plan, *random_batch(sizes, step), False).backward()
        for (name, row), tensor in rows.items():
            if row not in sampled_rows(name, plan):
                assert tensor.grad is None or not tensor.grad.any()
                tensor.grad = torch.zeros_like(tensor) if unsampled == "zero_grad" else None
        torch.nn.utils.clip_grad_norm_(list(rows.values()), MAX_NORM)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in assemble().items()}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_optimizer_is_torch_adamw_with_one_tensor_per_row(family, unsampled, sampled):
    sizes = FAMILIES[family]
    plans = [full_plan(sizes)] * 5
    if sampled:
        plans[:4] = [random_plan(sizes, step, gqa) for step, gqa in enumerate(["group", "query"] * 2)]
    assert_equal(train(sizes, plans, unsampled), train_with_torch(sizes, plans, unsampled), 1e-12)


def test_freeze_and_zero_grad_differ_only_where_something_is_unsampled():
    full = [full_plan(GPT2)] * 3
    assert_equal(train(GPT2, full, "freeze"), train(GPT2, full, "zero_grad"), 0.0)
    sampled = [random_plan(GPT2, step) for step in range(3)]
    frozen, drifting = train(GPT2, sampled, "freeze"), train(GPT2, sampled, "zero_grad")
    assert (frozen["1.up.weight"] - drifting["1.up.weight"]).abs().max() > 1e-6


def test_freeze_leaves_unsampled_rows_exactly_where_they_were():
    plan = random_plan(LLAMA, 7)
    before, after = random_parameters(LLAMA), train(LLAMA, [plan, plan], "freeze")
    for name in before:
        for row in sampled_rows(name, full_plan(LLAMA)):
            moved = not torch.equal(before[name][row], after[name][row])
            assert moved == (row in sampled_rows(name, plan)), (name, row)


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clip_is_torchs(max_norm):
    tensors = random_parameters(LLAMA)
    leaves = [torch.zeros_like(tensor).requires_grad_() for tensor in tensors.values()]
    for leaf, tensor in zip(leaves, tensors.values(), strict=True):
        leaf.grad = tensor.clone()
    theirs = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    torch.testing.assert_close(clip(tensors, max_norm), theirs, rtol=0, atol=1e-12)
    assert_equal(tensors, {name: leaf.grad for name, leaf in zip(tensors, leaves, strict=True)}, 1e-12)


def test_a_gradient_on_an_unsampled_row_is_refused():
    parameters, plan = random_parameters(GPT2), random_plan(GPT2, 1)
    optimizer = ReferenceAdamW(parameters, **ADAMW, decayed=matrices(GPT2), unsampled="zero_grad")
    gradients = {name: torch.ones_like(tensor) for name, tensor in parameters.items()}
    with pytest.raises(AssertionError, match="not sampled"):
        optimizer.step(gradients, plan, GPT2)


@pytest.mark.parametrize(
    ("norm", "position", "activation", "n_kv_heads"),
    list(product(("layernorm", "rmsnorm"), ("learned", "rope"), ("gelu", "swiglu"), (4, 2))),
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_mix_of_settings_reads_every_parameter(norm, position, activation, n_kv_heads, bias, tied):
    settings = {"norm": norm, "position": position, "mlp": activation, "bias": bias, "tied": tied}
    sizes = replace(GPT2, n_layers=2, n_kv_heads=n_kv_heads, **settings)
    _, gradients = loss_and_gradients(sizes, random_parameters(sizes), full_plan(sizes), *random_batch(sizes), True)
    for name, gradient in gradients.items():
        assert gradient_is_truly_zero(sizes, name) or gradient.abs().max() > 1e-9, name
