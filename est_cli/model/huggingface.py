"""Hugging Face's names and layouts for our weights, both ways: GPT2LMHeadModel and LlamaForCausalLM.

The differences are of layout only; no number changes.

ours                         GPT-2 (Conv1D, [in, out])       Llama (Linear, [out, in])
attention.qkv  [out, in]     attn.c_attn, transposed         q_proj, k_proj, v_proj: its rows, split
attention.out  [in, out]     attn.c_proj, as it is           o_proj, transposed
mlp.up         [out, in]     mlp.c_fc, transposed            gate_proj, up_proj: its halves
mlp.down       [in, out]     mlp.c_proj, as it is            down_proj, transposed
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from est_cli.config import ModelConfig
from est_cli.errors import UserError
from est_cli.model.huggingface_config import CLASSES, Family, from_config, to_config
from est_cli.model.transformer import Transformer

State = dict[str, Tensor]

_GPT2_BLOCK = {
    "norm1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_TRANSPOSED: dict[Family, tuple[str, ...]] = {
    "gpt2": ("attention.qkv", "mlp.up"),
    "llama": ("attention.out", "mlp.down"),
}
_LLAMA_BLOCK = {
    "norm1": "input_layernorm",
    "attention.out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp.down": "mlp.down_proj",
}
_LLAMA_PARTS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
}
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_NAMES_SHOWN = 3


def to_huggingface(model: Transformer) -> tuple[dict[str, Any], State]:
    """The config.json and the tensors of the class that holds `model`. Raises UserError where none can."""
    config = to_config(model.config)
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    translate = _to_gpt2 if config["model_type"] == "gpt2" else _to_llama
    return config, dict(translate(model.config, ours))


def from_huggingface(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, State]:
    """Our config and state of a folder's config.json and tensors. Raises UserError for what we cannot hold."""
    model = from_config(config)
    typed = {_without_prefix(name): name for name in tensors if not is_constant(name)}
    theirs = _Read({short: tensors[name] for short, name in typed.items()})
    read = _from_gpt2 if config["model_type"] == "gpt2" else _from_llama
    try:
        state = dict(read(model, theirs))
    except KeyError as error:
        raise UserError(f"the weights have no tensor {error.args[0]}") from None
    if not model.tie_embeddings:
        if "lm_head.weight" not in theirs:
            raise UserError("the weights have no tensor lm_head.weight, and config.json does not tie it")
        state["head"] = theirs["lm_head.weight"]
    # Some files hold the tied head a second time.
    left_over = [name for short, name in typed.items() if short not in {*theirs.read, "lm_head.weight"}]
    if left_over:
        raise UserError(f"{some(left_over)}: a {CLASSES[config['model_type']]} of this config.json has no such tensor")
    return model, state


class _Read(dict[str, Tensor]):
    """Tensors that remember which of them were asked for."""

    def __init__(self, tensors: State):
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def is_constant(name: str) -> bool:
    """Whether a tensor is no weight, but a constant that older versions of transformers stored with them."""
    return name.endswith(_BUFFERS)


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))


def _to_gpt2(model: ModelConfig, ours: State) -> Iterator[tuple[str, Tensor]]:
    yield "transformer.wte.weight", ours["embedding"]
    yield "transformer.wpe.weight", ours["positions"]
    for layer in range(model.n_layers):
        for name, theirs in _GPT2_BLOCK.items():
            weight = ours[f"blocks.{layer}.{name}.weight"]
            yield f"transformer.h.{layer}.{theirs}.weight", _turned("gpt2", name, weight)
            # The class always has biases; where ours has none they are zero.
            outputs = weight.shape[-1 if name in ("attention.out", "mlp.down") else 0]
            bias = ours.get(f"blocks.{layer}.{name}.bias", weight.new_zeros(outputs))
            yield f"transformer.h.{layer}.{theirs}.bias", bias
    yield "transformer.ln_f.weight", ours["norm.weight"]
    yield "transformer.ln_f.bias", ours["norm.bias"]
    yield from _head(ours)


def _from_gpt2(model: ModelConfig, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "embedding", theirs["wte.weight"]
    yield "positions", theirs["wpe.weight"]
    for layer in range(model.n_layers):
        for name, their_name in _GPT2_BLOCK.items():
            weight = theirs[f"h.{layer}.{their_name}.weight"]
            yield f"blocks.{layer}.{name}.weight", _turned("gpt2", name, weight)
            yield f"blocks.{layer}.{name}.bias", theirs[f"h.{layer}.{their_name}.bias"]
    yield "norm.weight", theirs["ln_f.weight"]
    yield "norm.bias", theirs["ln_f.bias"]


def _to_llama(model: ModelConfig, ours: State) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", ours["embedding"]
    for layer in range(model.n_layers):
        for key in (key for key in ours if key.startswith(f"blocks.{layer}.")):
            name, _, leaf = key.removeprefix(f"blocks.{layer}.").rpartition(".")
            if name in _LLAMA_PARTS:
                parts = ours[key].split(_part_rows(model, name))
                for their_name, part in zip(_LLAMA_PARTS[name], parts, strict=True):
                    yield f"model.layers.{layer}.{their_name}.{leaf}", part
            else:
                tensor = _turned("llama", name, ours[key]) if leaf == "weight" else ours[key]
                yield f"model.layers.{layer}.{_LLAMA_BLOCK[name]}.{leaf}", tensor
    yield "model.norm.weight", ours["norm.weight"]
    yield from _head(ours)


def _from_llama(model: ModelConfig, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "embedding", theirs["embed_tokens.weight"]
    for layer in range(model.n_layers):
        for name, their_name in _LLAMA_BLOCK.items():
            weight = theirs[f"layers.{layer}.{their_name}.weight"]
            yield f"blocks.{layer}.{name}.weight", _turned("llama", name, weight)
            if model.bias and "norm" not in name:
                yield f"blocks.{layer}.{name}.bias", theirs[f"layers.{layer}.{their_name}.bias"]
        for name, parts in _LLAMA_PARTS.items():
            for leaf in ("weight", "bias") if model.bias else ("weight",):
                tensors = [theirs[f"layers.{layer}.{part}.{leaf}"] for part in parts]
                yield f"blocks.{layer}.{name}.{leaf}", torch.cat(tensors)
    yield "norm.weight", theirs["norm.weight"]


def _part_rows(model: ModelConfig, name: str) -> list[int]:
    """Rows of each of the matrices that Llama keeps apart and we keep together."""
    if name == "mlp.up":
        return [model.d_ff] * 2
    return [heads * model.head_dim for heads in (model.n_heads, model.n_kv_heads, model.n_kv_heads)]


def _head(ours: State) -> Iterator[tuple[str, Tensor]]:
    if "head" in ours:
        yield "lm_head.weight", ours["head"]


def _turned(family: Family, name: str, weight: Tensor) -> Tensor:
    return weight.t() if name in _TRANSPOSED[family] else weight


def _without_prefix(name: str) -> str:
    """The first GPT-2 files name `wte.weight` what the class calls `transformer.wte.weight`."""
    return name.removeprefix("transformer.").removeprefix("model.")
