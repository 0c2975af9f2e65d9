"""Corpora that fit in a line, SentencePiece models and token files of them."""

import hashlib
import io
import json
import re
import sys

import numpy as np
import pytest
import sentencepiece

from est_cli.config import DataConfig, TokenizerConfig
from est_cli.data.splits import Split
from est_cli.data.tokens import TokenStore, open_store
from est_cli.errors import UserError

BYTE = TokenizerConfig("byte")
PIECES = TokenizerConfig("sentencepiece", vocab_size=400)

WORDS = re.findall(r"\w+", "def return self the value of a list is not None and in for while class import raise error")


def prose(n_lines: int, seed: int = 0) -> str:
    """Text that repeats words, not lines."""
    return "".join(
        " ".join(WORDS[(seed + i * (j + 3) + j * j) % len(WORDS)] for j in range(9)) + f" {seed} {i}\n"
        for i in range(n_lines)
    )


def jsonl(rows, column: str = "text", **more) -> bytes:
    return "".join(json.dumps({column: row, **more}) + "\n" for row in rows).encode()


def prepared(data: DataConfig, tokenizer=BYTE, model_vocab_size=512, say=lambda _: None) -> TokenStore:
    return open_store(data, tokenizer, model_vocab_size, say, show_progress=False)


def refusal(call, *arguments, **options) -> str:
    """What is said about bad input to a call."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def documents(store: TokenStore, tokens: np.ndarray) -> list[str]:
    """The documents that end in `tokens`."""
    ends = np.flatnonzero(tokens == store.tokenizer.eot)
    return [store.tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def python(*lines: str) -> list[str]:
    """The command of a process that runs `lines`. It knows the configs and modules that prepare text, and PIECES."""
    imports = ("import sys", "from est_cli.config import *", "from est_cli.data import preparation, streams, tokens")
    return [sys.executable, "-c", "\n".join([*imports, f"PIECES = {PIECES}", *lines])]


class Documents:
    """A corpus in memory."""

    def __init__(self, *documents: bytes, given_val=None, groups=None):
        self.documents = documents
        self.source = {"kind": "text"}
        self.sizes = np.array([len(document) for document in documents], dtype=np.int64)
        digests = [hashlib.blake2b(document, digest_size=8).digest() for document in documents]
        self.keys = np.frombuffer(b"".join(digests), dtype=np.uint64)
        self.given_val = given_val
        self.groups = groups
        self.packages = None

    def read(self, document, start, end):
        assert 0 <= start <= end <= self.sizes[document]
        return self.documents[document][start:end]


def sentencepiece_model(n_lines: int, **settings) -> bytes:
    """A model trained on prose."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(n_lines).split("\n")), model_writer=model, minloglevel=2, **settings
    )
    return model.getvalue()


def llama_model() -> bytes:
    """A model with Llama's settings: dummy prefix, bos and eos, byte fallback."""
    return sentencepiece_model(
        200,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
    )


def texts(*splits: Split) -> list[str]:
    """Whole documents, put together from consecutive splits or shards."""
    whole, parts = [], []
    for piece in (piece for split in splits for piece in split.pieces()):
        assert piece.continued == bool(parts)
        parts.append(piece.text)
        if piece.last:
            whole.append("".join(parts))
            parts = []
    assert not parts
    return whole
