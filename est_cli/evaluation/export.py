"""Writes a model as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, and checks it by loading it."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from est_cli.data.tokenizers import HFTokenizer, SentencePieceTokenizer, Tokenizer
from est_cli.errors import UserError
from est_cli.files import write_json
from est_cli.model.huggingface import to_huggingface
from est_cli.model.transformer import Transformer

TOLERANCE = 1e-5
"""Largest difference of a logit, in fp32, as a share of the largest logit where that is above 1."""

_SPECIAL_TOKENS = 32
"""Control tokens of a given tokenizer that are tried within a text, at most."""
_SPACE_MARK = "\u2581"
_END_OF_TEXT = "<|endoftext|>"
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_TEXT = (_Piece.NORMAL, _Piece.USER_DEFINED)
_CONTROL = (_Piece.CONTROL, _Piece.UNKNOWN)


def check_free(out: Path) -> None:
    """Raises UserError if `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: exists already; must be a new or an empty folder")


def export(model: Transformer, reference: Transformer, tokenizer: Tokenizer, out: Path) -> float | None:
    """Writes `model` to `out` and returns the largest difference of its logits from those of `reference`.

    `out` must be free (`check_free`); it appears only after the check. Returns None if transformers is not installed:
    then nothing was checked. Raises UserError if no Hugging Face class can hold the model or its tokenizer,
    RuntimeError if transformers loads something else.
    """
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
    write_json(folder / "config.json", {**config, **ends})
    write_json(folder / "generation_config.json", ends)
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
        converted = convert(tokenizer)
        converted.save(str(folder / "tokenizer.json"))
        eos = converted.id_to_token(tokenizer.eot)
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
    write_json(folder / "tokenizer_config.json", config)


def convert(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A `tokenizers.Tokenizer` with equal ids for every text. Raises UserError.

    SentencePiece's BPE and that of the `tokenizers` library are the same algorithm. Pieces have real spaces in place of
    SentencePiece's mark U+2581, so no normaliser is needed; a U+2581 in the text falls back to its bytes, as in ours.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
        if model.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
            raise UserError("this SentencePiece model is not a BPE model: tokenizer.json is written for BPE only")
        pieces, has_dummy_prefix = model.pieces, model.normalizer_spec.add_dummy_prefix
    else:
        pieces = [_Piece(piece=f"<0x{byte:02X}>", type=_Piece.BYTE) for byte in range(256)]
        pieces, has_dummy_prefix = [*pieces, _Piece(piece=_END_OF_TEXT, type=_Piece.CONTROL)], False
    converted = _build(pieces, has_dummy_prefix)
    for text in SAMPLES:
        ours, theirs = tokenizer.encode(text), converted.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise UserError(
                f"this {tokenizer.kind} tokenizer cannot be written as a tokenizer.json: the ids of {text[:40]!r} "
                f"would be {theirs[:8]}, and are {ours[:8]}"
            )
    return converted


def _build(pieces: Sequence[_Piece], has_dummy_prefix: bool) -> tokenizers.Tokenizer:
    """`has_dummy_prefix`: a space is added before a text."""
    names = [p.piece.replace(_SPACE_MARK, " ") if p.type in _TEXT else p.piece for p in pieces]
    unknown = next((p.piece for p in pieces if p.type == _Piece.UNKNOWN), None)
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=list(
                _merges({name: p.score for name, p in zip(names, pieces, strict=True) if p.type == _Piece.NORMAL})
            ),
            unk_token=unknown,
            byte_fallback="<0x00>" in names,
            fuse_unk=unknown is not None,
        )
    )
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if has_dummy_prefix:
        # In ours, a text that begins with the mark itself starts with the mark's bytes.
        bpe.normalizer = normalizers.Replace(Regex(f"\\A(?=[^{_SPACE_MARK}])"), " ")
        steps.append(decoders.Strip(" ", 1, 0))
    bpe.decoder = decoders.Sequence(steps)
    bpe.add_special_tokens([AddedToken(p.piece, normalized=False, special=True) for p in pieces if p.type in _CONTROL])
    always_whole = [
        name for name, p in zip(names, pieces, strict=True) if p.type == _Piece.USER_DEFINED and len(name) > 1
    ]
    bpe.add_tokens([AddedToken(name, normalized=False) for name in always_whole])
    bpe.encode_special_tokens = True
    return bpe


def _merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two others: SentencePiece merges any two that make a piece, the best first."""
    for piece in sorted(scores, key=lambda name: -scores[name]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                yield left, right
