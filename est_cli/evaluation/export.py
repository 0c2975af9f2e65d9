"""Writes a model as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, and checks it by loading it."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from est_cli.data.tokenizers import HFTokenizer, SentencePieceTokenizer, Tokenizer
from est_cli.errors import UserError
from est_cli.model.huggingface import to_huggingface
from est_cli.model.transformer import Transformer

TOLERANCE = 1e-5
"""Largest difference of a logit, in fp32, as a share of the largest logit where that is above 1."""

_SPECIAL_TOKENS = 32
"""Control tokens of a given tokenizer that are tried within a text, at most."""


def check_free(out: Path) -> None:
    """Raises UserError if `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: exists already; must be a new or an empty folder")


def export(model: Transformer, reference: Transformer, tokenizer: Tokenizer, out: Path) -> float | None:
    """Writes `model` to `out` and returns the largest difference of its logits from those of `reference`.

    The folder appears only after the check. Returns None if transformers is not installed: then nothing was checked.
    Raises UserError if no Hugging Face class can hold the model or its tokenizer, RuntimeError if transformers loads
    something else.
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
    # The library makes files that only their owner can read; an export is for sharing.
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
    theirs.model_max_length = sys.maxsize  # or it warns that the sample texts are too long for a short model
    control = tokenizer.special_tokens if isinstance(tokenizer, HFTokenizer) else []
    for text in (*SAMPLES, *(f"a {token} b" for token in control[:_SPECIAL_TOKENS])):
        # With default arguments: training never saw tokens that a template adds.
        if theirs(text)["input_ids"] != tokenizer.encode(text):
            raise RuntimeError(f"transformers' token ids differ from ours for {text!r}: nothing was exported")
    return difference


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


_SPACE_MARK = "\u2581"
_END_OF_TEXT = "<|endoftext|>"

SAMPLES = (
    "",
    "a",
    " leading space, trailing space ",
    "def f(x):\n    return x + 1\n\n\n\tif x:  # tabs\t\tand  runs   of     spaces\n",
    "\n\n \n\t \r\n",
    "Füße naïve Ωμέγα 日本語 Привет \U0001f600\u200d\U0001f468 \u00a0|\u2003|",
    "U+2581 \u2581 is \u2581\u2581 text\u2581too",
    "<0x41> <unk> <s> </s> <|endoftext|>",
    "import os, sys\nclass Naïve(Exception):\n    '''Doc: a\\tb'''\n" * 3,
    "0123456789 " * 20 + "~!@#$%^&*()_+{}|:\"<>?`-=[]\\;',./",
)
"""Texts on which an exported tokenizer is compared with ours."""


def save_tokenizer_files(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `AutoTokenizer` reads them.

    Raises UserError if the format cannot hold the tokenizer, or its ids differ on the sample texts.
    """
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_as_trained(folder)
        eos = tokenizer.eos_token
    else:
        converted, eos = convert(tokenizer)
        converted.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": eos,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # As in training: text that looks like a control token stays text, and nothing is added to a text.
        "split_special_tokens": True,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def convert(tokenizer: Tokenizer) -> tuple[tokenizers.Tokenizer, str]:
    """A `tokenizers.Tokenizer` with equal ids for every text, and the token that ends a document. Raises UserError.

    SentencePiece's BPE and that of the `tokenizers` library are the same algorithm. Pieces have real spaces in place of
    SentencePiece's mark U+2581, so no normaliser is needed; a U+2581 in the text falls back to its bytes, as in ours.
    """
    pieces = _sentencepieces(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else _bytes()
    return _checked(_build(pieces), tokenizer), pieces.names[tokenizer.eot]


@dataclass
class _Pieces:
    """A vocabulary with real spaces."""

    names: list[str] = field(default_factory=list)
    """In the order of their ids."""
    merged: list[tuple[float, str]] = field(default_factory=list)
    """Pieces made by merging, with their scores: the highest is merged first."""
    specials: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    """Texts that are always one token."""
    unknown: str | None = None
    dummy_prefix: bool = False
    """The tokenizer adds a space before the text."""


def _bytes() -> _Pieces:
    return _Pieces([*(f"<0x{byte:02X}>" for byte in range(256)), _END_OF_TEXT], specials=[_END_OF_TEXT])


def _sentencepieces(tokenizer: SentencePieceTokenizer) -> _Pieces:
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    if model.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise UserError("this SentencePiece model is not a BPE model: tokenizer.json is written for BPE only")
    found = _Pieces(dummy_prefix=model.normalizer_spec.add_dummy_prefix)
    for piece in model.pieces:
        is_text = piece.type in (kinds.NORMAL, kinds.USER_DEFINED)
        name = piece.piece.replace(_SPACE_MARK, " ") if is_text else piece.piece
        found.names.append(name)
        if piece.type == kinds.NORMAL:
            found.merged.append((piece.score, name))
        elif piece.type == kinds.USER_DEFINED and len(name) > 1:
            found.whole.append(name)
        elif piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            found.specials.append(name)
            found.unknown = name if piece.type == kinds.UNKNOWN else found.unknown
    return found


def _build(pieces: _Pieces) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(pieces.names)},
            merges=list(_merges(pieces.merged)),
            unk_token=pieces.unknown,
            byte_fallback="<0x00>" in pieces.names,
            fuse_unk=pieces.unknown is not None,
        )
    )
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if pieces.dummy_prefix:
        # In ours, a text that begins with the mark itself starts with the mark's bytes.
        bpe.normalizer = normalizers.Replace(Regex(f"\\A(?=[^{_SPACE_MARK}])"), " ")
        steps.append(decoders.Strip(" ", 1, 0))
    bpe.decoder = decoders.Sequence(steps)
    bpe.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in pieces.specials])
    bpe.add_tokens([AddedToken(name, normalized=False) for name in pieces.whole])
    return bpe


def _merges(merged: list[tuple[float, str]]) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two others: SentencePiece merges any two that make a piece, the best first."""
    known = {name for _, name in merged}
    for _, piece in sorted(merged, key=lambda scored: -scored[0]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                yield left, right


def _checked(converted: tokenizers.Tokenizer, tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    converted.encode_special_tokens = True
    for text in SAMPLES:
        ours, theirs = tokenizer.encode(text), converted.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise UserError(
                f"this {tokenizer.kind} tokenizer cannot be written as a tokenizer.json: the ids of {text[:40]!r} "
                f"would be {theirs[:8]}, and are {ours[:8]}"
            )
    return converted
