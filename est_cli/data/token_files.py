"""Writes a shard's tokens to a file, batch by batch."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from est_cli.data.splits import Piece, Split
from est_cli.data.tokenizers import Tokenizer

_BATCH_BYTES = 4 << 20


@dataclass
class Counts:
    """What a split, or a part of it, came to."""

    documents: int = 0
    """Documents that end in it."""
    bytes: int = 0
    """UTF-8 bytes of its text."""
    tokens: int = 0
    replaced: int = 0
    """Invalid UTF-8 sequences that became U+FFFD."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.documents + other.documents,
            self.bytes + other.bytes,
            self.tokens + other.tokens,
            self.replaced + other.replaced,
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 (little-endian) that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_tokens(
    split: Split, tokenizer: Tokenizer, file: Path, threads: int | None, advance: Callable[[int], None]
) -> Counts:
    """Tokens of every document of `split`, each that ends followed by `tokenizer.eot`, in one raw file on the disk.

    `advance` is told the bytes of each batch of text that was written.
    """
    counts = Counts()
    dtype = token_dtype(tokenizer.vocab_size)
    end_of_text = np.array([tokenizer.eot])
    with file.open("wb") as stream:
        for batch in _batches(split.pieces()):
            ids = tokenizer.encode_batch([piece.text for piece in batch], [piece.continued for piece in batch], threads)
            parts = [
                part
                for piece, own in zip(batch, ids, strict=True)
                for part in ((own, end_of_text) if piece.last else (own,))
            ]
            tokens = np.concatenate(parts).astype(dtype)
            tokens.tofile(stream)
            n_bytes = sum(piece.n_bytes for piece in batch)
            counts += Counts(
                sum(piece.last for piece in batch), n_bytes, len(tokens), sum(piece.replaced for piece in batch)
            )
            advance(n_bytes)
        stream.flush()
        os.fsync(stream.fileno())
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
