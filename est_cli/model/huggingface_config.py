"""Our architecture and Hugging Face's config.json, both ways: GPT2LMHeadModel and LlamaForCausalLM."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from est_cli.config import ModelConfig
from est_cli.errors import UserError

Family = Literal["gpt2", "llama"]

CLASSES: dict[Family, str] = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
_SETTINGS: dict[Family, dict[str, str]] = {
    "gpt2": {"norm": "layernorm", "position": "learned", "mlp": "gelu"},
    "llama": {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"},
}

_READ: dict[Family, tuple[str, ...]] = {
    "gpt2": (
        "activation_function", "add_cross_attention", "layer_norm_epsilon", "n_ctx", "n_embd", "n_head", "n_inner",
        "n_layer", "n_positions", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx", "scale_attn_weights",
    ),
    "llama": (
        "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
        "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pretraining_tp",
        "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    ),
}  # fmt: skip
_READ_BY_BOTH = ("model_type", "tie_word_embeddings", "vocab_size")
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


def family_of(model: ModelConfig) -> Family:
    """The class that can hold `model`. Raises UserError naming each setting that none can."""
    family: Family = "gpt2" if model.position == "learned" else "llama"
    problems = [
        f"model.{key}={getattr(model, key)}: {CLASSES[family]} (model.position={model.position}) has {key}={value} only"
        for key, value in _SETTINGS[family].items()
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
    """The config.json of the class that holds `model`. Raises UserError where none can."""
    return _gpt2_config(model) if family_of(model) == "gpt2" else _llama_config(model)


def from_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our config of a config.json. Raises UserError for what our model cannot hold."""
    family = config.get("model_type")
    if family not in CLASSES:
        raise UserError(f"config.json: model_type={family}: must be one of {', '.join(CLASSES)}")
    _check_known(config, family)
    return _model_of_gpt2(config) if family == "gpt2" else _model_of_llama(config)


def _check_known(config: Mapping[str, Any], family: Family) -> None:
    """Raises UserError naming each setting that nothing here reads, unless it is switched off."""
    if config.get("quantization_config"):
        raise UserError(
            "config.json: quantization_config: quantized weights are not read; must be a folder of "
            "float32, float16 or bfloat16 weights"
        )
    known = {*_READ[family], *_READ_BY_BOTH}
    problems = [
        f"config.json: {key}={value}: is not read, and may change what the model computes; if it does not, remove it"
        for key, value in config.items()
        if value and key not in known and not key.startswith("_") and not _OF_NO_WEIGHT.fullmatch(key)
    ]
    if problems:
        raise UserError(*problems)


def _gpt2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [CLASSES["gpt2"]],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.max_seq_len,
        "n_embd": model.d_model,
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "n_inner": model.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": "float32",
    }


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [CLASSES["llama"]],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        # Before and since version 5 of transformers.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": "float32",
    }


def _model_of_gpt2(config: Mapping[str, Any]) -> ModelConfig:
    _require(
        config,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    width, heads = config["n_embd"], config["n_head"]
    return ModelConfig(
        n_layers=config["n_layer"],
        n_heads=heads,
        n_kv_heads=heads,
        d_model=width,
        d_ff=config.get("n_inner") or 4 * width,
        vocab_size=config["vocab_size"],
        max_seq_len=config["n_positions"],
        bias=True,
        tie_embeddings=config.get("tie_word_embeddings", True),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        init="gpt2",
        head_dim=width // heads,
        **_SETTINGS["gpt2"],
    )


def _model_of_llama(config: Mapping[str, Any]) -> ModelConfig:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"config.json: rope_parameters={rope}: must be of type default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json: rope_parameters={rope}: partial_rotary_factor must be 1")
    _require(config, hidden_act=("silu",), mlp_bias=(config.get("attention_bias", False),))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelConfig(
        n_layers=config["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        d_model=width,
        d_ff=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_seq_len=config["max_position_embeddings"],
        bias=config.get("attention_bias", False),
        tie_embeddings=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        init="tinyllama",
        head_dim=config.get("head_dim") or width // heads,
        **_SETTINGS["llama"],
    )


def _require(config: Mapping[str, Any], **allowed: tuple) -> None:
    """Keys that are absent have the value that we need: the defaults of both classes do."""
    problems = [
        f"config.json: {key}={config[key]}: must be {' or '.join(map(str, values))}"
        for key, values in allowed.items()
        if key in config and config[key] not in values
    ]
    if problems:
        raise UserError(*problems)
