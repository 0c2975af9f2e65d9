"""Writes a split's tokens to a file, batch by batch, with progress."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from est_cli.data.splits import Piece, Split
from est_cli.data.tokenizers import Tokenizer

_BATCH_BYTES = 4 << 20


@dataclass
class Counts:
    """What a split came to."""

    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of its text."""
    tokens: int = 0
    replaced: int = 0
    """Invalid UTF-8 sequences that became U+FFFD."""


class TokenizingProgress:
    """A bar on standard error: bytes of text, MB/s, time left."""

    def __init__(self, total_bytes: int, show: bool):
        self.start = time.perf_counter()
        self._bar = Progress(TextColumn("tokenizing {task.description}"), BarColumn(), DownloadColumn(),
                             TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
                             disable=not show, transient=True)
        self._task = self._bar.add_task("", total=total_bytes)

    def __enter__(self) -> "TokenizingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, split: str, n_bytes: int) -> None:
        self._bar.update(self._task, description=split, advance=n_bytes)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 (little-endian) that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_tokens(split: Split, name: str, tokenizer: Tokenizer, file: Path, progress: TokenizingProgress) -> Counts:
    """Tokens of every document of `split`, each document followed by `tokenizer.eot`, in one raw file."""
    counts = Counts(documents=len(split.documents))
    dtype = token_dtype(tokenizer.vocab_size)
    end_of_text = np.array([tokenizer.eot])
    with file.open("wb") as stream:
        for batch in _batches(split.pieces()):
            ids = tokenizer.encode_batch([piece.text for piece in batch], [piece.continued for piece in batch])
            parts = [part for piece, own in zip(batch, ids, strict=True)
                     for part in ((own, end_of_text) if piece.last else (own,))]
            tokens = np.concatenate(parts).astype(dtype)
            tokens.tofile(stream)
            n_bytes = sum(piece.n_bytes for piece in batch)
            counts.bytes += n_bytes
            counts.tokens += len(tokens)
            counts.replaced += sum(piece.replaced for piece in batch)
            progress.advance(name, n_bytes)
    return counts


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, n_bytes = [], 0
    for piece in pieces:
        batch.append(piece)
        n_bytes += piece.n_bytes
        if n_bytes >= _BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch
