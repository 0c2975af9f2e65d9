"""Weights to start from: a Hugging Face folder, fitted to the composed model.

A model with more vocabulary rows than the folder (GPT-2's 50257 padded to 50304) gets rows of the mean: their logits
are then the mean of the others. Rows of zeros would have logits of 0, which for GPT-2 is far above all real ones.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from est_cli.config import ModelConfig
from est_cli.errors import UserError, nearest
from est_cli.model.huggingface import from_config, from_huggingface, is_constant, some
from est_cli.model.transformer import Transformer

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_SIZES = (
    "norm", "position", "mlp", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "bias",
    "tie_embeddings", "norm_eps",
)  # fmt: skip
"""Keys of the model that the folder decides; so do vocab_size, max_seq_len and rope_theta in their own way."""


def check_pretrained(model: ModelConfig) -> None:
    """Raises UserError if model.init_from is no folder that fits `model`."""
    # Names, shapes and types only: what cannot be read is told before there is a run directory.
    found, _ = _read(model, values=False)
    problems = [
        f"model.{key}={_show(getattr(model, key))}: the weights of model.init_from={model.init_from} have "
        f"{_show(getattr(found, key))}; give model.{key}={_show(getattr(found, key))}"
        for key in _differing(model, found)
    ]
    if problems:
        raise UserError(*problems)


@torch.no_grad()
def load_pretrained(model: Transformer, own: Callable[[Tensor], Tensor] = lambda whole: whole) -> None:
    """Fill the model's parameters from its model.init_from; `own` cuts out what this process holds of a tensor.

    Raises UserError if they do not fit.
    """
    check_pretrained(model.config)
    _, state = _read(model.config, values=True)
    for name, parameter in model.named_parameters():
        found = state[name]
        if name in ("embedding", "head") and len(found) < len(parameter):
            found = torch.cat([found, found.float().mean(0, keepdim=True).expand(len(parameter) - len(found), -1)])
        found = own(found)
        if found.shape != parameter.shape:
            raise UserError(
                f"model.init_from={model.config.init_from}: {name} has shape {tuple(found.shape)}, "
                f"and its config.json says {tuple(parameter.shape)}"
            )
        parameter.copy_(found)


def _differing(model: ModelConfig, found: ModelConfig) -> list[str]:
    keys = [key for key in _SIZES if getattr(model, key) != getattr(found, key)]
    if "bias" in keys and found.position == "learned" and not _has_biases(model):
        keys.remove("bias")
    keys += ["vocab_size"] if model.vocab_size < found.vocab_size else []
    if model.position == found.position:
        # Learned positions are weights; rotary ones work for any length.
        key = "max_seq_len" if model.position == "learned" else "rope_theta"
        keys += [key] if getattr(model, key) != getattr(found, key) else []
    return keys


def _has_biases(model: ModelConfig) -> bool:
    """Whether a GPT-2 folder, whose class always has biases, has one that is not zero."""
    _, state = _read(model, values=True)
    return any(bool(t.any()) for name, t in state.items() if name.endswith(".bias") and "norm" not in name)


def _read(model: ModelConfig, values: bool) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The folder's model and its weights under our names, on meta without `values`; any problem names the folder."""
    name = f"model.init_from={model.init_from}"
    try:
        return _read_folder(Path(model.init_from).expanduser(), values)
    except UserError as error:
        raise UserError(*(f"{name}: {problem}" for problem in error.problems)) from None
    except KeyError as error:
        raise UserError(f"{name}: its config.json or index lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: cannot be read: {error}") from error


def _read_folder(folder: Path, values: bool) -> tuple[ModelConfig, dict[str, Tensor]]:
    if not (folder / "config.json").is_file():
        siblings = [str(path.parent) for path in folder.parent.glob("*/config.json")]
        raise UserError(f"must be a folder with config.json and {_WEIGHTS}{nearest(str(folder), siblings)}")
    if not any((folder / name).is_file() for name in (_WEIGHTS, _INDEX)):
        raise UserError(f"has no {_WEIGHTS}; other formats of weights are not read")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"config.json: cannot be read ({error})") from None
    from_config(config)  # what it cannot hold is told before what the tensors cannot
    return from_huggingface(config, _read_tensors(folder, values))


def _read_tensors(folder: Path, values: bool) -> dict[str, Tensor]:
    """Every tensor, on meta without `values`. Raises UserError naming those that hold codes or are not finite."""
    files = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file():
        files = sorted(set(json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    broken: dict[str, list[str]] = {}
    for file in files:
        try:
            with safe_open(folder / file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    part = stored.get_slice(name)
                    dtype, size = part.get_dtype(), part.get_shape()
                    tensors[name] = stored.get_tensor(name) if values else torch.empty(size, device="meta")
                    if is_constant(name):
                        continue
                    if dtype not in _DTYPES:
                        why = f"stored as {dtype}, must be one of {', '.join(_DTYPES)}; quantized weights are not read"
                        broken.setdefault(why, []).append(name)
                    elif values and not tensors[name].isfinite().all():
                        broken.setdefault("holds values that are not finite (NaN or infinity)", []).append(name)
        except Exception as error:  # safetensors raises its own kind for damaged files
            raise UserError(f"{file}: cannot be read ({error})") from None
    if broken:
        raise UserError(*(f"{some(names)}: {why}" for why, names in broken.items()))
    return tensors


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
