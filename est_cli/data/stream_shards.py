"""Token shards of a stream, in order, each with the position at which the next begins."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from est_cli.data.text_streams import TextStream
from est_cli.data.tokenizers import Tokenizer

SHARD_TOKENS = 1 << 20
"""A shard ends with the first document that brings it here."""
_BATCH_TEXTS = 64


def text_key(text: str) -> bytes:
    """What documents are compared by."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"stream-{number:08}.bin"


def shard_tokens(folder: Path, number: int) -> int | None:
    """How many tokens a shard has, or None where it is not there yet."""
    try:
        return json.loads(shard_file(folder, number).with_suffix(".json").read_text("utf-8"))["tokens"]
    except FileNotFoundError:
        return None


@dataclass
class Feed:
    """A source of the stream: its tokenized documents, and how much of it was used."""

    texts: TextStream
    weight: float
    tokenizer: Tokenizer
    skipped: frozenset[bytes]
    """Keys of the documents that validation has."""
    taken: int = 0
    _batch: list[np.ndarray] = field(default_factory=list)
    _batch_position: dict | None = None
    _used: int = 0

    def next_document(self) -> np.ndarray:
        while self._used == len(self._batch):
            self._fill()
        document = self._batch[self._used]
        self._used += 1
        self.taken += len(document)
        return document

    def state(self) -> dict:
        return {"position": self._batch_position, "used": self._used, "taken": self.taken}

    def go_to(self, state: dict) -> None:
        self.taken = state["taken"]
        if state["position"] is not None:
            self.texts.go_to(state["position"])
            self._fill()
            self._used = state["used"]

    def _fill(self) -> None:
        self._batch_position = self.texts.position()
        texts = [text for text in self.texts.next(_BATCH_TEXTS) if text_key(text) not in self.skipped]
        ids = self.tokenizer.encode_batch(texts)
        self._batch = [np.append(own, self.tokenizer.eot) for own in ids]
        self._used = 0


class ShardWriter:
    """Writes the shards of a mixture, which are the same whoever writes them and wherever one began.

    The next document always comes from the source with the fewest tokens per weight so far; a source that ends
    starts again, so the stream has no end.
    """

    def __init__(self, folder: Path, feeds: Sequence[Feed], dtype: np.dtype):
        self._folder, self._feeds, self._dtype = folder, feeds, dtype
        self._next = 0

    def write(self, number: int) -> None:
        """Raises OSError, and UserError or whatever the dataset raises where it cannot be read."""
        if number != self._next:
            self._go_behind(number - 1)
        documents, n_tokens = [], 0
        while n_tokens < SHARD_TOKENS:
            feed = min(self._feeds, key=lambda feed: feed.taken / feed.weight)
            documents.append(feed.next_document().astype(self._dtype))
            n_tokens += len(documents[-1])
        file = shard_file(self._folder, number)
        partial = file.with_suffix(f".{os.getpid()}")
        with partial.open("wb") as out:
            np.concatenate(documents).tofile(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
        partial.write_text(json.dumps({"tokens": n_tokens, "feeds": [feed.state() for feed in self._feeds]}), "utf-8")
        os.replace(partial, file.with_suffix(".json"))
        self._next = number + 1

    def _go_behind(self, number: int) -> None:
        record = json.loads(shard_file(self._folder, number).with_suffix(".json").read_text("utf-8"))
        for feed, state in zip(self._feeds, record["feeds"], strict=True):
            feed.go_to(state)
