"""Our tokenizers as Hugging Face `tokenizer.json` files, with equal ids for every text.

SentencePiece's BPE and that of the `tokenizers` library are the same algorithm; what differs is written down here.
Pieces keep real spaces in the place of SentencePiece's mark U+2581, so that no normaliser is needed, and a U+2581 of
the text, which is no piece, falls back to its bytes, as ours does.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from est_cli.data.tokenizers import HFTokenizer, SentencePieceTokenizer, Tokenizer
from est_cli.errors import UserError

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
    """tokenizer.json and tokenizer_config.json, as `AutoTokenizer` reads them.

    Raises UserError where the format cannot hold the tokenizer, or its ids differ on the sample texts.
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
        # Text that looks like a control token stays text, and nothing is put around a text, as in training.
        "split_special_tokens": True,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def convert(tokenizer: Tokenizer) -> tuple[tokenizers.Tokenizer, str]:
    """A `tokenizers.Tokenizer` with the ids of ours, and the token that ends a document. Raises UserError."""
    pieces = _sentencepieces(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else _bytes()
    return _checked(_build(pieces), tokenizer), pieces.names[tokenizer.eot]


@dataclass
class _Pieces:
    """A vocabulary, spaces as spaces."""

    names: list[str] = field(default_factory=list)
    """In the order of their ids."""
    merged: list[tuple[float, str]] = field(default_factory=list)
    """Pieces that merging makes, with their scores: the highest merges first."""
    specials: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    """Texts that are a token wherever they stand."""
    unknown: str | None = None
    dummy_prefix: bool = False
    """A space is put before the text."""


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
        # Ours starts a text that begins with the mark itself by the mark's bytes.
        bpe.normalizer = normalizers.Replace(Regex(f"\\A(?=[^{_SPACE_MARK}])"), " ")
        steps.append(decoders.Strip(" ", 1, 0))
    bpe.decoder = decoders.Sequence(steps)
    bpe.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in pieces.specials])
    bpe.add_tokens([AddedToken(name, normalized=False) for name in pieces.whole])
    return bpe


def _merges(merged: list[tuple[float, str]]) -> Iterator[tuple[str, str]]:
    """Every way to make each piece of two others: SentencePiece merges whatever gives a piece, the best first."""
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
