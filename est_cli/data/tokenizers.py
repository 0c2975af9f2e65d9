"""Tokenizers: text → ids and back, without loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from est_cli.config import TokenizerConfig
from est_cli.data.sentencepiece_bpe import SentencePieceTokenizer, SentencePieceTraining
from est_cli.errors import UserError


class Tokenizer(Protocol):
    kind: str
    vocab_size: int
    eot: int
    """The token that ends every document."""
    definition: dict
    """What decides its ids, for fingerprints."""
    token_bytes: np.ndarray
    """int64 [vocab_size]: UTF-8 bytes of text that each token stands for; control tokens 0."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(
        self, texts: Sequence[str], continued: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[np.ndarray]:
        """Ids of each text, on all cores or on `threads`. A `continued` text goes on where an earlier one stopped."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer` reads."""


class ByteTokenizer:
    """Token i is byte i, and 256 ends a document."""

    kind = "byte"
    vocab_size = 257
    eot = 256
    definition = {"kind": "byte"}  # noqa: RUF012

    def __init__(self):
        self.token_bytes = np.array([1] * 256 + [0])

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(
        self, texts: Sequence[str], continued: Sequence[bool] | None = None, threads: int | None = None
    ) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < self.eot).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """There is nothing to keep."""


def choose_tokenizer(config: TokenizerConfig, model_vocab_size: int) -> Tokenizer | SentencePieceTraining:
    """The tokenizer that the configuration names, or the training that will make it.

    Raises UserError where it has more ids than the model, or its file cannot be read.
    """
    if config.kind == "sentencepiece" and config.path is None:
        return SentencePieceTraining(config, model_vocab_size)
    if config.kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer.open(config.path)
    elif config.kind == "hf":
        from est_cli.data.hf_tokenizer import HFTokenizer

        tokenizer = HFTokenizer.open(config.path)
    else:
        tokenizer = ByteTokenizer()
    if tokenizer.vocab_size > model_vocab_size:
        name = f"tokenizer.path={config.path}" if config.path else f"tokenizer={config.kind}"
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} ids, and must have at most model.vocab_size={model_vocab_size}"
        )
    return tokenizer


def load_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """A tokenizer that `save` wrote into `folder`."""
    if kind == "sentencepiece":
        return SentencePieceTokenizer.open(str(folder / SentencePieceTokenizer.FILE))
    if kind == "hf":
        from est_cli.data.hf_tokenizer import HFTokenizer

        return HFTokenizer.open(str(folder))
    return ByteTokenizer()
