"""Hugging Face's GPT2LMHeadModel and LlamaForCausalLM, both ways: config.json, and the names and layouts of weights.

Weights differ in layout only; no number changes.

ours                         GPT-2 (Conv1D, [in, out])       Llama (Linear, [out, in])
attention.qkv  [out, in]     attn.c_attn, transposed         q_proj, k_proj, v_proj: its rows, split
attention.out  [in, out]     attn.c_proj, as it is           o_proj, transposed
mlp.up         [out, in]     mlp.c_fc, transposed            gate_proj, up_proj: its halves
mlp.down       [in, out]     mlp.c_proj, as it is            down_proj, transposed
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from est_cli.config import ModelConfig
from est_cli.errors import UserError
from est_cli.model.transformer import Transformer

Family = Literal["gpt2", "llama"]
State = dict[str, Tensor]

CLASSES: dict[Family, str] = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
_STYLE: dict[Family, dict[str, str]] = {
    "gpt2": {"norm": "layernorm", "position": "learned", "mlp": "gelu"},
    "llama": {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"},
}

_KEYS: dict[Family, dict[str, str]] = {
    "gpt2": {
        "vocab_size": "vocab_size",
        "n_positions": "max_seq_len",
        "n_embd": "d_model",
        "n_layer": "n_layers",
        "n_head": "n_heads",
        "n_inner": "d_ff",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    "llama": {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_seq_len",
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "head_dim": "head_dim",
        "rms_norm_eps": "norm_eps",
        "attention_bias": "bias",
        "tie_word_embeddings": "tie_embeddings",
    },
}
"""config.json's names → ours."""
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": {
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
}
"""What an absent key means to the class."""
_REQUIRED: dict[Family, dict[str, tuple]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu",)},
}
"""Values that our model has. An absent key has them too: they are the defaults of both classes."""
_ALSO_READ = {
    "gpt2": ("n_ctx", "reorder_and_upcast_attn"),
    "llama": ("mlp_bias", "pretraining_tp", "rope_parameters", "rope_scaling", "rope_theta"),
}
_OF_NO_WEIGHT = re.compile(
    r"architectures|auto_map|dtype|torch_dtype|transformers_version|use_cache|initializer_range|gradient_checkpointing"
    r"|\w+_token_ids?|\w+_pdrop|\w+_dropout|summary_\w+|task_specific_params|finetuning_task|problem_type|prefix"
    r"|id2label|label2id|num_labels|name_or_path|tokenizer_class|model_max_length|max_sequence_length|is_llama_config"
    r"|is_decoder|output_\w+|return_dict\w*|torchscript|use_bfloat16|chunk_size_feed_forward|tf_legacy_loss"
    r"|(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_[kp]"
    r"|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|suppress_tokens|begin_suppress_tokens|remove_invalid_values|exponential_decay_\w+"
    r"|unsloth_\w+|max_window_layers|attn_implementation|label_names"
)
"""Settings about training, tokens and generation, and records of where a file comes from."""


_BLOCK: dict[Family, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "norm1": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "norm2": ("ln_2",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
    },
    "llama": {
        "norm1": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "norm2": ("post_attention_layernorm",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    },
}
"""Our modules of a block → the modules that hold their rows, in order."""
_TRANSPOSED: dict[Family, tuple[str, ...]] = {
    "gpt2": ("attention.qkv", "mlp.up"),
    "llama": ("attention.out", "mlp.down"),
}
_AROUND: dict[Family, dict[str, str]] = {
    "gpt2": {
        "embedding": "wte.weight",
        "positions": "wpe.weight",
        "norm.weight": "ln_f.weight",
        "norm.bias": "ln_f.bias",
    },
    "llama": {"embedding": "embed_tokens.weight", "norm.weight": "norm.weight"},
}
_PREFIX: dict[Family, tuple[str, str]] = {"gpt2": ("transformer.", "h"), "llama": ("model.", "layers")}
"""Before the name of every tensor but the head's, and of a layer."""
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_NAMES_SHOWN = 3


def family_of(model: ModelConfig) -> Family:
    """The class that can hold `model`. Raises UserError naming each setting that none can."""
    family: Family = "gpt2" if model.position == "learned" else "llama"
    problems = [
        f"model.{key}={getattr(model, key)}: {CLASSES[family]} (model.position={model.position}) has {key}={value} only"
        for key, value in _STYLE[family].items()
        if getattr(model, key) != value
    ]
    if family == "gpt2":
        problems += _gpt2_widths(model)
    elif model.d_model % model.n_heads:
        allowed = [
            str(n) for n in range(model.n_kv_heads, model.d_model + 1, model.n_kv_heads) if model.d_model % n == 0
        ]
        problems.append(
            f"model.n_heads={model.n_heads}: {CLASSES[family]} needs a number of heads that divides "
            f"model.d_model={model.d_model}; with model.n_kv_heads={model.n_kv_heads}: {', '.join(allowed) or 'none'}"
        )
    if problems:
        raise UserError(*problems)
    return family


def _gpt2_widths(model: ModelConfig) -> Iterator[str]:
    if model.n_kv_heads != model.n_heads:
        yield f"model.n_kv_heads={model.n_kv_heads}: {CLASSES['gpt2']} has no grouped-query attention"
    if model.n_heads * model.head_dim != model.d_model:
        yield (
            f"model.n_heads={model.n_heads}: {CLASSES['gpt2']} ties d_model to n_heads · head_dim, and "
            f"{model.d_model} is not {model.n_heads} · {model.head_dim}; it can hold a subnetwork of fewer MLP "
            "neurons and layers, with every head"
        )


def to_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of the class that holds `model`. Raises UserError if no class can."""
    family = family_of(model)
    config = {theirs: getattr(model, ours) for theirs, ours in _KEYS[family].items()}
    if family == "gpt2":
        config |= {"activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        config |= {"hidden_act": "silu", "mlp_bias": model.bias}
        # Before and since version 5 of transformers.
        config |= {
            "rope_theta": model.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        }
    return {"architectures": [CLASSES[family]], "model_type": family, **config, "dtype": "float32"}


def from_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our config of a config.json. Raises UserError for what our model cannot hold, KeyError for a missing size."""
    family = config.get("model_type")
    if family not in CLASSES:
        raise UserError(f"config.json: model_type={family}: must be one of {', '.join(CLASSES)}")
    _check_known(config, family)
    problems = [
        f"config.json: {key}={config[key]}: must be {' or '.join(map(str, values))}"
        for key, values in _required(config, family).items()
        if key in config and config[key] not in values
    ]
    if problems:
        raise UserError(*problems)
    width, heads = (
        config[key] for key in (("n_embd", "n_head") if family == "gpt2" else ("hidden_size", "num_attention_heads"))
    )
    given = {**_DEFAULTS[family], **config}
    sizes = {ours: given[theirs] for theirs, ours in _KEYS[family].items()}
    sizes["head_dim"] = sizes.get("head_dim") or width // heads
    sizes["n_kv_heads"] = sizes.get("n_kv_heads") or heads
    if family == "gpt2":
        return ModelConfig(**{**sizes, "d_ff": sizes["d_ff"] or 4 * width}, bias=True, init="gpt2", **_STYLE[family])
    return ModelConfig(**sizes, rope_theta=_rope_theta(config), init="tinyllama", **_STYLE[family])


def _required(config: Mapping[str, Any], family: Family) -> dict[str, tuple]:
    mlp_bias = {"mlp_bias": (config.get("attention_bias", False),)} if family == "llama" else {}
    return {**_REQUIRED[family], **mlp_bias}


def _rope_theta(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"config.json: rope_parameters={rope}: must be of type default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json: rope_parameters={rope}: partial_rotary_factor must be 1")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def _check_known(config: Mapping[str, Any], family: Family) -> None:
    """Raises UserError naming each setting that nothing here reads, unless it is switched off."""
    if config.get("quantization_config"):
        raise UserError(
            "config.json: quantization_config: quantized weights are not read; must be a folder of "
            "float32, float16 or bfloat16 weights"
        )
    known = {"model_type", *_KEYS[family], *_REQUIRED[family], *_ALSO_READ[family]}
    problems = [
        f"config.json: {key}={value}: is not read, and may change what the model computes; if it does not, remove it"
        for key, value in config.items()
        if value and key not in known and not key.startswith("_") and not _OF_NO_WEIGHT.fullmatch(key)
    ]
    if problems:
        raise UserError(*problems)


def to_huggingface(model: Transformer) -> tuple[dict[str, Any], State]:
    """The config.json and the tensors of the class that holds `model`. Raises UserError if no class can."""
    config = to_config(model.config)
    family: Family = config["model_type"]
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {}
    for name, theirs, transposed in _tensors(model.config, family):
        # GPT-2's class always has biases; where ours has none they are zero.
        tensor = ours[name] if name in ours else _zero_bias(name, ours)
        parts = tensor.split(_part_rows(model.config, name)) if len(theirs) > 1 else [tensor]
        state |= {
            f"{_PREFIX[family][0]}{their}": part.t() if transposed else part
            for their, part in zip(theirs, parts, strict=True)
        }
    if "head" in ours:
        state["lm_head.weight"] = ours["head"]
    return config, state


def from_huggingface(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, State]:
    """Our config and state of a folder's config.json and tensors. Raises UserError for what we cannot hold."""
    model = from_config(config)
    family: Family = config["model_type"]
    # The first GPT-2 files name `wte.weight` what the class calls `transformer.wte.weight`.
    typed = {
        name.removeprefix("transformer.").removeprefix("model."): name for name in tensors if not is_constant(name)
    }
    state, read = {}, {"lm_head.weight"}  # some files hold a tied head a second time
    try:
        for name, theirs, transposed in _tensors(model, family):
            parts = [tensors[typed[their]] for their in theirs]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            state[name] = whole.t() if transposed else whole
            read.update(theirs)
    except KeyError as error:
        raise UserError(f"the weights have no tensor {error.args[0]}") from None
    if not model.tie_embeddings:
        if "lm_head.weight" not in typed:
            raise UserError("the weights have no tensor lm_head.weight, and config.json does not tie it")
        state["head"] = tensors[typed["lm_head.weight"]]
    if left_over := [name for short, name in typed.items() if short not in read]:
        raise UserError(f"{some(left_over)}: a {CLASSES[family]} of this config.json has no such tensor")
    return model, state


def _tensors(model: ModelConfig, family: Family) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Our name of each parameter but the head, theirs without the prefix, and whether one is the other transposed."""
    biased = family == "gpt2" or model.bias
    around = _AROUND[family].items()
    yield from ((ours, (theirs,), False) for ours, theirs in around if not ours.startswith("norm"))
    for layer in range(model.n_layers):
        for name, modules in _BLOCK[family].items():
            for leaf in ("weight", "bias") if biased and (family == "gpt2" or "norm" not in name) else ("weight",):
                theirs = tuple(f"{_PREFIX[family][1]}.{layer}.{module}.{leaf}" for module in modules)
                yield f"blocks.{layer}.{name}.{leaf}", theirs, leaf == "weight" and name in _TRANSPOSED[family]
    yield from ((ours, (theirs,), False) for ours, theirs in around if ours.startswith("norm"))


def _zero_bias(name: str, ours: State) -> Tensor:
    weight = ours[name.replace(".bias", ".weight")]
    return weight.new_zeros(weight.shape[-1 if name.endswith(("attention.out.bias", "mlp.down.bias")) else 0])


def _part_rows(model: ModelConfig, name: str) -> list[int]:
    """Rows of each of the matrices that Llama keeps apart and we keep together."""
    if ".mlp.up." in name:
        return [model.d_ff] * 2
    return [heads * model.head_dim for heads in (model.n_heads, model.n_kv_heads, model.n_kv_heads)]


def is_constant(name: str) -> bool:
    """Whether a tensor is no weight, but a constant that older versions of transformers stored with them."""
    return name.endswith(_BUFFERS)


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))
