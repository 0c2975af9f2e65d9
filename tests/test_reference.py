"""The reference agrees with sources that know nothing of it: transformers, torch.optim, and its own algebra."""

import math
import random
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
    matrices,
    mlp,
    sampled_rows,
    shapes,
)
from tiny import random_batch
from torch import Tensor

GPT2 = Sizes(
    n_layers=3, n_heads=4, n_kv_heads=4, head_dim=2, d_model=8, d_ff=6, vocab_size=11, max_seq_len=7,
    norm="layernorm", position="learned", mlp="gelu", bias=True, tied=True,
)  # fmt: skip
LLAMA = replace(
    GPT2, n_kv_heads=2, head_dim=4, norm="rmsnorm", position="rope", mlp="swiglu", bias=False, tied=False,
    norm_eps=1e-6, rope_theta=500.0,
)  # fmt: skip
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


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        difference = (found[name] - expected[name]).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    model, generator = model.double().eval(), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        shift = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.4 * values + shift
    return model


TRANSFORMERS = {
    "learned": {
        "embedding": "transformer.wte.weight", "positions": "transformer.wpe.weight", "final_norm": "transformer.ln_f",
        "layer": "transformer.h", "norm1": "ln_1", "norm2": "ln_2", **dict.fromkeys("qkv", "attn.c_attn"),
        "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "head": "lm_head.weight", "transposed": "q k v up",
    },
    "rope": {
        "embedding": "model.embed_tokens.weight", "final_norm": "model.norm", "layer": "model.layers",
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
        **{name: f"self_attn.{name}_proj" for name in "qkvo"},
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}, "head": "lm_head.weight",
        "transposed": "o down",
    },
}  # fmt: skip
"""The names of GPT-2, whose Conv1D is input-major and holds q, k and v side by side; and of Llama."""


def textbook(sizes: Sizes, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors by the reference's names, in its shapes."""
    names, out = TRANSFORMERS[sizes.position], {}
    for name, shape in shapes(sizes).items():
        *layer, module, kind = name.split(".") if "." in name else (name, "")
        theirs = ".".join([*(f"{names['layer']}.{number}" for number in layer), names[module], kind]).rstrip(".")
        tensor = tensors[theirs]
        if kind == "weight" and module in names["transposed"].split():
            tensor = tensor.T
        if names[module] == "attn.c_attn":
            tensor = tensor.chunk(3)["qkv".index(module)]
        out[name] = tensor.reshape(shape)
    return out


class _TorchWithoutFloat32:
    """transformers computes Llama's norm, softmax and rotary angles in float32 whatever the model's dtype is."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def transformers_model(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": sizes.vocab_size, "tie_word_embeddings": sizes.tied, "attn_implementation": "eager"}
    if sizes.position == "learned":
        config = transformers.GPT2Config(
            n_layer=sizes.n_layers, n_head=sizes.n_heads, n_embd=sizes.d_model, n_inner=sizes.d_ff,
            n_positions=sizes.max_seq_len, layer_norm_epsilon=sizes.norm_eps, bos_token_id=0, eos_token_id=0, **common,
        )  # fmt: skip
        return randomize(transformers.GPT2LMHeadModel(config))
    monkeypatch.setattr("transformers.models.llama.modeling_llama.torch", _TorchWithoutFloat32())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = transformers.LlamaConfig(
        num_hidden_layers=sizes.n_layers, num_attention_heads=sizes.n_heads, num_key_value_heads=sizes.n_kv_heads,
        head_dim=sizes.head_dim, hidden_size=sizes.d_model, intermediate_size=sizes.d_ff,
        max_position_embeddings=sizes.max_seq_len, rms_norm_eps=sizes.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        attention_bias=sizes.bias, mlp_bias=sizes.bias, **common,
    )  # fmt: skip
    return randomize(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize(
    "sizes",
    [
        *(replace(GPT2, tied=tied) for tied in (True, False)),
        *(
            replace(LLAMA, tied=tied, bias=bias, n_kv_heads=n_kv_heads)
            for tied, bias, n_kv_heads in ((False, False, 2), (True, True, 1), (False, True, 4))
        ),
    ],
    ids=["gpt2", "gpt2-untied", "llama", "llama-bias-tied-one-kv-head", "llama-bias-mha"],
)
def test_the_full_plan_is_transformers_model(sizes, monkeypatch):
    """Logits, loss, and every gradient."""
    model = transformers_model(sizes, monkeypatch)
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


@pytest.mark.parametrize("gqa", ["group", "query"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_sampled_rows_get_gradients(family, gqa):
    sizes = FAMILIES[family]
    plan = random_plan(sizes, 5, gqa)
    _, gradients = loss_and_gradients(sizes, random_parameters(sizes), plan, *random_batch(sizes), False)
    skipped = {str(layer) for layer in range(sizes.n_layers)} - {str(layer) for layer in plan.layers}
    assert skipped
    for name, gradient in gradients.items():
        sampled = sampled_rows(name, plan)
        assert (sampled == []) == (name.split(".")[0] in skipped), name
        for row in [...] if sampled == [...] else range(len(gradient)):
            if row not in sampled:
                assert not gradient[row].any(), (name, row)
            elif not gradient_is_truly_zero(sizes, name):
                assert gradient[row].abs().max() > 1e-9, (name, row)


@pytest.mark.parametrize(("branch", "units"), [(attention, "n_heads"), (mlp, "d_ff")], ids=["attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rescaled_outputs_of_all_subsets_average_to_the_full_one(family, branch, units):
    sizes, total = FAMILIES[family], getattr(FAMILIES[family], units)
    parameters = random_parameters(sizes)
    x = torch.randn(2, 5, sizes.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = branch(sizes, parameters, 0, list(range(total)), x)
    assert full.abs().max() > 0.1
    for kept in range(1, total + 1):
        outputs = [branch(sizes, parameters, 0, list(subset), x) for subset in combinations(range(total), kept)]
        torch.testing.assert_close(sum(outputs) / len(outputs), full, rtol=0, atol=1e-6)


def train(sizes: Sizes, plans: list[ReferencePlan], unsampled: str) -> dict[str, Tensor]:
    """Some steps of the reference optimizer with a moving learning rate."""
    parameters = random_parameters(sizes)
    optimizer = ReferenceAdamW(parameters, **ADAMW, decayed=matrices(shapes(sizes)), unsampled=unsampled)
    for step, plan in enumerate(plans):
        optimizer.lr = ADAMW["lr"] / (1 + step)
        _, gradients = loss_and_gradients(sizes, parameters, plan, *random_batch(sizes, seed=step), False)
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
    decay = [tensor for (name, _), tensor in rows.items() if name in matrices(shapes(sizes))]
    keep = [tensor for (name, _), tensor in rows.items() if name not in matrices(shapes(sizes))]
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
        loss(sizes, assemble(), plan, *random_batch(sizes, seed=step), False).backward()
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
