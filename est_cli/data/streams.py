"""data.streaming=true: token shards that a thread writes while training reads them.

Validation and the tokenizer come from the head of the stream. Each shard records the position at which the next one
begins, so any process can continue the stream, and its shards do not depend on who writes them.

Windows follow each other in the stream and are shuffled within blocks of `BLOCK_WINDOWS`: sample n is window
permutation(block)[n % BLOCK_WINDOWS] of block n // BLOCK_WINDOWS, a pure function of (seed, n) as without streaming.
"""

import atexit
import bisect
import queue
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.batches import permute
from est_cli.data.corpora import Source, grouped, text_key
from est_cli.data.preparation import Counts, token_dtype, tokenizer_facts
from est_cli.data.tokenizers import SentencePieceTraining, Tokenizer
from est_cli.errors import UserError
from est_cli.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from est_cli.data.hf_corpus import TextStream

VAL_BYTES = 8 << 20
"""Text at the head of the stream that validation gets; about 2 million tokens."""
SHARD_TOKENS = 1 << 20
"""A shard ends with the first document that reaches this size."""
BLOCK_WINDOWS = 1024
_BATCH_TEXTS = 64
_SHARDS_AHEAD = 4
_WAIT_S = 0.02
_STOPPING_S = 10
_KEYS = "val-keys.bin"
"""Keys of the validation documents, which training skips."""


def write_streamed_store(
    folder: Path, sources: Sequence[Source], data: DataConfig, chosen: Tokenizer | SentencePieceTraining, say: Say
) -> dict:
    """Writes validation and the tokenizer into `folder`; returns their part of the manifest.

    Raises UserError for streams that cannot be read or are too short.
    """
    say(f"data: reading {VAL_BYTES / 1e6:.1f} MB of the stream for validation")
    texts = [text for source in sources for text in _head(source, source.corpus.val_texts().one_pass(), VAL_BYTES)]
    held_out = {text_key(text.encode("utf-8", "replace")) for text in texts}
    (folder / _KEYS).write_bytes(b"".join(sorted(held_out)))
    training = isinstance(chosen, SentencePieceTraining)
    heads = [_training_head(source, held_out, chosen.train_bytes if training else 1) for source in sources]
    tokenizer = chosen.train([text for head in heads for text in head], say) if training else chosen
    tokenizer.save(folder)
    documents = [np.append(ids, tokenizer.eot) for ids in tokenizer.encode_batch(texts)]
    tokens = np.concatenate(documents).astype(token_dtype(tokenizer.vocab_size))
    tokens.tofile(folder / "val.bin")
    counts = Counts(len(texts), sum(map(_n_bytes, texts)), len(tokens))
    origins = [source.corpus.source for source in sources]
    return {
        "source": origins[0] if len(origins) == 1 else {"kind": data.kind, "streaming": True, "sources": origins},
        "streaming": True,
        **tokenizer_facts(tokenizer),
        "splits": {"val": counts._asdict()},
    }


def _training_head(source: Source, held_out: Container[bytes], n_bytes: int) -> list[str]:
    head = _head(source, source.corpus.training_texts(held_out).one_pass(), n_bytes)
    if not head:
        raise UserError(
            f"data.streaming=true: validation takes {VAL_BYTES:,} bytes at the head, and the stream of "
            f"{source.corpus.source['path']} has no more; use data.streaming=false"
        )
    return head


def _head(source: Source, texts: Iterable[str], n_bytes: int) -> list[str]:
    """The first texts of a source, until they reach its share of `n_bytes`."""
    return next(grouped(texts, _n_bytes, int(n_bytes * source.weight)), [])


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"stream-{number:08}.bin"


def _shard_record(folder: Path, number: int) -> dict:
    """A shard's `tokens` (their number) and `feeds`; empty if the shard is not there yet."""
    return read_json(shard_file(folder, number).with_suffix(".json"))


@dataclass
class Feed:
    """A source of the stream: its tokenized documents, and how much of it was used."""

    texts: "TextStream"
    weight: float
    tokenizer: Tokenizer
    taken: int = 0
    _batch: list[np.ndarray] = field(default_factory=list)
    _batch_position: dict | None = None
    _used: int = 0

    def next_document(self) -> np.ndarray:
        if self._used == len(self._batch):
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
        ids = self.tokenizer.encode_batch(self.texts.next(_BATCH_TEXTS))
        self._batch = [np.append(own, self.tokenizer.eot) for own in ids]
        self._used = 0


class ShardWriter:
    """Writes the shards of the store in `folder`.

    The next document always comes from the source with the fewest tokens per weight so far. A source that ends starts
    again, so the stream is endless.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], tokenizer: Tokenizer):
        keys = (folder / _KEYS).read_bytes()
        held_out = {keys[i : i + 8] for i in range(0, len(keys), 8)}
        self._feeds = [Feed(source.corpus.training_texts(held_out), source.weight, tokenizer) for source in sources]
        self._folder, self._dtype = folder, token_dtype(tokenizer.vocab_size)
        self._next = 0

    def write(self, number: int, stopped: Callable[[], bool]) -> None:
        """Writes nothing if `stopped` becomes true meanwhile.

        Raises OSError, UserError, and RunFailed if the dataset cannot be read.
        """
        if number != self._next:
            for feed, state in zip(self._feeds, _shard_record(self._folder, number - 1)["feeds"], strict=True):
                feed.go_to(state)
        documents, n_tokens = [], 0
        while n_tokens < SHARD_TOKENS:
            if stopped():
                return
            feed = min(self._feeds, key=lambda feed: feed.taken / feed.weight)
            documents.append(feed.next_document().astype(self._dtype))
            n_tokens += len(documents[-1])
        file = shard_file(self._folder, number)
        with replacing(file) as partial, partial.open("wb") as out:
            np.concatenate(documents).tofile(out)
        with replacing(file.with_suffix(".json")) as partial:
            write_json(partial, {"tokens": n_tokens, "feeds": [feed.state() for feed in self._feeds]})
        self._next = number + 1


class StreamedTokens:
    """The endless training tokens of a store: reads the shards that exist and waits for the others."""

    def __init__(self, folder: Path, dtype: np.dtype, open_writer: Callable[[], ShardWriter]):
        """The writing thread calls `open_writer` when the first shard is missing."""
        self._folder, self._dtype, self._open_writer = folder, dtype, open_writer
        self._ends: list[int] = []
        self._ahead = _SHARDS_AHEAD
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._write_ahead, daemon=True).start()
        atexit.register(self._stop)

    def _stop(self) -> None:
        """Ends writing. If Python ended a thread inside a tokenizer's C++ code, that would abort the process."""
        self._stopped.set()
        self._writing.acquire(timeout=_STOPPING_S)

    def windows(self, seq_len: int, seed: int, first: int, count: int) -> np.ndarray:
        """The `count` training samples from number `first` on, int64 [count, seq_len + 1].

        Raises the writer's exception if the stream cannot be read.
        """
        blocks, places = np.divmod(first + np.arange(count, dtype=np.int64), BLOCK_WINDOWS)
        windows = blocks * BLOCK_WINDOWS + permute(places, BLOCK_WINDOWS, seed, blocks)
        return np.stack([self.read(start, start + seq_len + 1) for start in (windows * seq_len).tolist()])

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens range(start, end) of the stream, int64."""
        while not self._ends or self._ends[-1] < end:
            self._await_shard(len(self._ends))
        number = bisect.bisect_right(self._ends, start)
        parts = []
        while start < end:
            shard_start = self._ends[number - 1] if number else 0
            stop = min(end, self._ends[number])
            offset = (start - shard_start) * self._dtype.itemsize
            parts.append(np.fromfile(shard_file(self._folder, number), self._dtype, stop - start, offset=offset))
            start, number = stop, number + 1
        return np.concatenate(parts).astype(np.int64)

    def _await_shard(self, number: int) -> None:
        self._asked.put(number + 1 + self._ahead)
        while not (record := _shard_record(self._folder, number)):
            if self._error is not None:
                raise self._error
            time.sleep(_WAIT_S)
        self._ends.append((self._ends[-1] if self._ends else 0) + record["tokens"])

    def _write_ahead(self) -> None:
        writer, number = None, 0
        try:
            while True:
                wanted = self._asked.get()
                # One of several processes writes; the others find its shards.
                with filelock.FileLock(self._folder / "stream.lock"):
                    while number < wanted:
                        if not _shard_record(self._folder, number):
                            with self._writing:
                                writer = writer or self._open_writer()
                                writer.write(number, self._stopped.is_set)
                        number += 1
                # Only the process that has the dataset open writes ahead; the others fill in missing shards.
                self._ahead = _SHARDS_AHEAD if writer else 0
        except BaseException as error:
            self._error = error
