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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from est_cli.config import ModelConfig
from est_cli.errors import UserError
from est_cli.model.transformer import Transformer

State = dict[str, Tensor]


class Family(NamedTuple):
    """How a class of Hugging Face names what our model has."""

    class_name: str
    style: dict[str, str]
    """Our settings that every model of the class has."""
    keys: dict[str, str]
    """Our settings → config.json's."""
    defaults: dict[str, Any]
    """What an absent key of config.json means."""
    required: dict[str, tuple]
    """Values that our model has. An absent key has them too: they are the defaults of the class."""
    outside: dict[str, str]
    """Our tensors outside of the blocks → theirs, except for the head."""
    layers: str
    """What comes before the number of a layer."""
    block: dict[str, str]
    """Our modules of a block → the modules that hold their rows, in order."""


GPT2 = Family(
    "GPT2LMHeadModel",
    style={"norm": "layernorm", "position": "learned", "mlp": "gelu"},
    keys={"d_model": "n_embd", "n_heads": "n_head", "vocab_size": "vocab_size", "max_seq_len": "n_positions",
          "n_layers": "n_layer", "d_ff": "n_inner", "norm_eps": "layer_norm_epsilon",
          "tie_embeddings": "tie_word_embeddings"},
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    required={"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
              "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    outside={"embedding": "transformer.wte.weight", "positions": "transformer.wpe.weight",
             "norm.weight": "transformer.ln_f.weight", "norm.bias": "transformer.ln_f.bias"},
    layers="transformer.h",
    block={"norm1": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
           "norm2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
)  # fmt: skip
LLAMA = Family(
    "LlamaForCausalLM",
    style={"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"},
    keys={"d_model": "hidden_size", "n_heads": "num_attention_heads", "vocab_size": "vocab_size",
          "max_seq_len": "max_position_embeddings", "n_layers": "num_hidden_layers",
          "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "d_ff": "intermediate_size",
          "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "bias": "attention_bias",
          "tie_embeddings": "tie_word_embeddings"},
    defaults={"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
              "attention_bias": False, "tie_word_embeddings": False},
    required={"hidden_act": ("silu",)},
    outside={"embedding": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"},
    layers="model.layers",
    block={"norm1": "input_layernorm", "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
           "attention.out": "self_attn.o_proj", "norm2": "post_attention_layernorm",
           "mlp.up": "mlp.gate_proj mlp.up_proj", "mlp.down": "mlp.down_proj"},
)  # fmt: skip
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}
"""By config.json's model_type."""

_WITHOUT_EFFECT = re.compile(
    r"architectures|auto_map|dtype|torch_dtype|transformers_version|use_cache|initializer_range|gradient_checkpointing"
    r"|\w+_token_ids?|\w+_pdrop|\w+_dropout|summary_\w+|task_specific_params|finetuning_task|problem_type|prefix"
    r"|id2label|label2id|num_labels|name_or_path|tokenizer_class|model_max_length|max_sequence_length|is_llama_config"
    r"|is_decoder|output_\w+|return_dict\w*|torchscript|use_bfloat16|chunk_size_feed_forward|tf_legacy_loss"
    r"|(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_[kp]"
    r"|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|suppress_tokens|begin_suppress_tokens|remove_invalid_values|exponential_decay_\w+"
    r"|unsloth_\w+|max_window_layers|attn_implementation|label_names|n_ctx|reorder_and_upcast_attn|pretraining_tp"
)
"""Settings that change no logit: of training, tokens and generation, and records of where a file comes from."""
_ROPE = ("rope_parameters", "rope_scaling")
_HEAD = "lm_head.weight"
_OUTPUTS = ("attention.out", "mlp.down")
"""Modules whose weights we hold as [in, out]."""
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_NAMES_SHOWN = 3


def family_of(model: ModelConfig) -> str:
    """The family that can hold `model`. Raises UserError naming each setting that none can."""
    family = "gpt2" if model.position == "learned" else "llama"
    class_name = FAMILIES[family].class_name
    problems = [
        f"model.{key}={getattr(model, key)}: {class_name} (model.position={model.position}) has {key}={value} only"
        for key, value in FAMILIES[family].style.items()
        if getattr(model, key) != value
    ]
    if family == "gpt2" and model.n_kv_heads != model.n_heads:
        problems.append(f"model.n_kv_heads={model.n_kv_heads}: {class_name} has no grouped-query attention")
    if family == "gpt2" and model.n_heads * model.head_dim != model.d_model:
        problems.append(
            f"model.n_heads={model.n_heads}: {class_name} ties d_model to n_heads · head_dim, and {model.d_model} is "
            f"not {model.n_heads} · {model.head_dim}; it can hold a subnetwork of fewer MLP neurons and layers, with "
            "every head"
        )
    if family == "llama" and model.d_model % model.n_heads:
        multiples = range(model.n_kv_heads, model.d_model + 1, model.n_kv_heads)
        allowed = ", ".join(str(n) for n in multiples if model.d_model % n == 0)
        problems.append(
            f"model.n_heads={model.n_heads}: {class_name} needs a number of heads that divides "
            f"model.d_model={model.d_model}; with model.n_kv_heads={model.n_kv_heads}: {allowed or 'none'}"
        )
    if problems:
        raise UserError(*problems)
    return family


def to_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of the class that holds `model`. Raises UserError if no class can."""
    family = family_of(model)
    config = {theirs: getattr(model, ours) for ours, theirs in FAMILIES[family].keys.items()}
    if family == "gpt2":
        config |= {"activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        config |= {"hidden_act": "silu", "mlp_bias": model.bias}
        # transformers before version 5 reads rope_theta, and since then rope_parameters.
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": model.rope_theta}
    return {"architectures": [FAMILIES[family].class_name], "model_type": family, **config, "dtype": "float32"}


def from_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our config of a config.json. Raises UserError for what our model cannot hold, KeyError for a missing size."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"config.json: model_type={family}: must be one of {', '.join(FAMILIES)}")
    _check(config, family)
    given = {**FAMILIES[family].defaults, **config}
    sizes = {ours: given[theirs] for ours, theirs in FAMILIES[family].keys.items()}
    sizes["head_dim"] = sizes.get("head_dim") or sizes["d_model"] // sizes["n_heads"]
    sizes["n_kv_heads"] = sizes.get("n_kv_heads") or sizes["n_heads"]
    if family == "gpt2":
        sizes |= {"d_ff": sizes["d_ff"] or 4 * sizes["d_model"], "bias": True, "init": "gpt2"}
    else:
        sizes |= {"rope_theta": _rope_theta(config), "init": "tinyllama"}
    return ModelConfig(**sizes, **FAMILIES[family].style)


def _check(config: Mapping[str, Any], family: str) -> None:
    """Raises UserError naming each setting that nothing here reads, or else each with a value that we do not have.

    A setting that is switched off need not be read.
    """
    if config.get("quantization_config"):
        raise UserError(
            "config.json: quantization_config: quantized weights are not read; must be a folder of "
            "float32, float16 or bfloat16 weights"
        )
    required = dict(FAMILIES[family].required)
    if family == "llama":
        required["mlp_bias"] = (config.get("attention_bias", False),)
    known = {"model_type", *FAMILIES[family].keys.values(), *required, *_ROPE}
    problems = [
        f"config.json: {key}={value}: is not read, and may change what the model computes; if it does not, remove it"
        for key, value in config.items()
        if value and key not in known and not key.startswith("_") and not _WITHOUT_EFFECT.fullmatch(key)
    ] or [
        f"config.json: {key}={config[key]}: must be {' or '.join(map(str, values))}"
        for key, values in required.items()
        if key in config and config[key] not in values
    ]
    if problems:
        raise UserError(*problems)


def _rope_theta(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"config.json: rope_parameters={rope}: must be of type default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json: rope_parameters={rope}: partial_rotary_factor must be 1")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def to_huggingface(model: Transformer) -> tuple[dict[str, Any], State]:
    """The config.json and the tensors of the class that holds `model`. Raises UserError if no class can."""
    config = to_config(model.config)
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {}
    for name, theirs, transposed in _tensors(model.config, config["model_type"]):
        # GPT-2's class always has biases; where ours has none they are zero.
        tensor = ours[name] if name in ours else _zero_bias(name, ours)
        parts = tensor.split(_part_rows(model.config, name)) if len(theirs) > 1 else [tensor]
        state |= {their: part.t() if transposed else part for their, part in zip(theirs, parts, strict=True)}
    return config, state


def from_huggingface(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, State]:
    """Our config and state of a folder's config.json and tensors. Raises UserError for what we cannot hold."""
    model, family = from_config(config), config["model_type"]
    given = {_short(name): name for name in tensors if not is_constant(name)}
    state, read = {}, {_HEAD}  # some files hold a tied head a second time
    for name, theirs, transposed in _tensors(model, family):
        names = [_short(their) for their in theirs]
        if missing := [short for short in names if short not in given]:
            tied = ", and config.json does not tie it" if name == "head" else ""
            raise UserError(f"the weights have no tensor {missing[0]}{tied}")
        parts = [tensors[given[short]] for short in names]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[name] = whole.t() if transposed else whole
        read.update(names)
    if left_over := [name for short, name in given.items() if short not in read]:
        raise UserError(f"{some(left_over)}: a {FAMILIES[family].class_name} of this config.json has no such tensor")
    return model, state


def _short(name: str) -> str:
    """The first GPT-2 files name `wte.weight` what the class calls `transformer.wte.weight`."""
    return name.removeprefix("transformer.").removeprefix("model.")


def _tensors(model: ModelConfig, family: str) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """For each parameter our name, their names, and whether one is the other transposed."""
    names, is_gpt2 = FAMILIES[family], family == "gpt2"
    yield from ((ours, (theirs,), False) for ours, theirs in names.outside.items())
    for layer in range(model.n_layers):
        for module, their_modules in names.block.items():
            is_norm = "norm" in module
            for leaf in ("weight", "bias") if is_gpt2 or (model.bias and not is_norm) else ("weight",):
                theirs = tuple(f"{names.layers}.{layer}.{their}.{leaf}" for their in their_modules.split())
                # GPT-2's class holds all matrices as [in, out], Llama's none.
                transposed = leaf == "weight" and not is_norm and (module in _OUTPUTS) != is_gpt2
                yield f"blocks.{layer}.{module}.{leaf}", theirs, transposed
    if not model.tie_embeddings:
        yield "head", (_HEAD,), False


def _zero_bias(name: str, ours: State) -> Tensor:
    weight = ours[name.replace(".bias", ".weight")]
    return weight.new_zeros(weight.shape[-1 if any(module in name for module in _OUTPUTS) else 0])


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
