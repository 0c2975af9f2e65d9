"""A model as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, checked by loading it."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from est_cli.data.tokenizer_json import SAMPLES, save_tokenizer_files
from est_cli.data.tokenizers import HFTokenizer, Tokenizer
from est_cli.errors import UserError
from est_cli.model.huggingface import to_huggingface
from est_cli.model.transformer import Transformer

TOLERANCE = 1e-5
"""Largest difference of a logit, in fp32, as a share of the largest logit where that is above 1."""

_SPECIAL_TOKENS = 32
"""Control tokens of a given tokenizer that are tried within a text, at most."""


def check_free(out: Path) -> None:
    """Raises UserError where `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: exists already; must be a new or an empty folder")


def export(model: Transformer, reference: Transformer, tokenizer: Tokenizer, out: Path) -> float | None:
    """Write `model` to `out`, and return the largest difference of its logits from those of `reference`.

    The folder appears only when it has been checked, or, with None, where transformers is not installed and it
    could not be. Raises UserError where no Hugging Face class holds the model or its tokenizer, RuntimeError where
    what transformers loads differs.
    """
    check_free(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(model, tokenizer, partial)
        difference = _check(reference, tokenizer, partial)
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def _write(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    config, tensors = to_huggingface(model)
    # Every document follows an end-of-text token, so it also begins one.
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    _write_json(folder / "config.json", {**config, **ends})
    _write_json(folder / "generation_config.json", ends)
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # The library keeps its files to their owner; the folder is there to be shared.
    shutil.copymode(folder / "config.json", weights)
    save_tokenizer_files(tokenizer, folder, model.config.max_seq_len)


@torch.no_grad()
def _check(reference: Transformer, tokenizer: Tokenizer, folder: Path) -> float | None:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    length = min(reference.config.max_seq_len, 64)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(reference.config.vocab_size, (2, length), generator=generator)
    ours = reference.float().cpu().logits(inputs)
    difference = (ours - loaded(inputs).logits).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
        raise RuntimeError(f"transformers' logits differ from ours by {difference:.2g}: nothing was exported")
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.model_max_length = sys.maxsize  # the sample texts are longer than a short model's, which it would warn of
    control = tokenizer.special_tokens if isinstance(tokenizer, HFTokenizer) else []
    for text in (*SAMPLES, *(f"a {token} b" for token in control[:_SPECIAL_TOKENS])):
        # As people call it: whatever is put around a text was never trained on.
        if theirs(text)["input_ids"] != tokenizer.encode(text):
            raise RuntimeError(f"transformers' token ids differ from ours for {text!r}: nothing was exported")
    return difference


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
