"""Mixtures: whole documents of several token streams laid one after another, in proportion to their weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from est_cli.data.token_files import Counts


@dataclass
class TokenStream:
    """The documents of a source's split, tokenized."""

    files: Sequence[Path]
    """Raw token files, one after the other; a document may go on in the next."""
    counts: Counts
    """Of all files."""
    weight: float
    taken: int = 0
    """Tokens that went into the mixture."""
    documents: int = 0
    """Documents that went into the mixture."""

    @property
    def tokens_per_weight(self) -> float:
        return self.taken / self.weight

    @property
    def passes(self) -> float:
        """How often the source was used."""
        return self.taken / self.counts.tokens

    def mixed_counts(self) -> Counts:
        """What of the source is in the mixture; of a pass that was not ended, the text is its share of the tokens."""
        n_bytes, replaced = (round(number * self.passes) for number in (self.counts.bytes, self.counts.replaced))
        return Counts(self.documents, n_bytes, self.taken, replaced)


def interleave(streams: Sequence[TokenStream], eot: int, dtype: np.dtype, file: Path) -> None:
    """Writes the mixture to `file`, and into the streams what was taken of each.

    The next document always comes from the stream with the fewest tokens per weight so far (the first of equals), so
    that shares are never further from the weights than one document. A stream that ends starts again; the mixture is
    complete when every stream was used once and those behind have caught up.
    """
    endless = [_endless(stream.files, eot, dtype) for stream in streams]
    n_unfinished, goal = len(streams), 0.0
    with file.open("wb") as out:
        while True:
            i = min(range(len(streams)), key=lambda i: streams[i].tokens_per_weight)
            stream = streams[i]
            if not n_unfinished and stream.tokens_per_weight >= goal:
                return
            document = next(endless[i])
            out.write(document)
            first_pass = stream.taken < stream.counts.tokens
            stream.taken += len(document)
            stream.documents += 1
            if first_pass and stream.taken >= stream.counts.tokens:
                n_unfinished -= 1
                goal = max(stream.tokens_per_weight for stream in streams)


def _endless(files: Sequence[Path], eot: int, dtype: np.dtype) -> Iterator[memoryview]:
    while True:
        yield from _documents(files, eot, dtype)


def _documents(files: Sequence[Path], eot: int, dtype: np.dtype) -> Iterator[memoryview]:
    """The tokens of each document, with its end."""
    rest = np.empty(0, dtype)
    for file in files:
        tokens = np.concatenate([rest, np.fromfile(file, dtype)])
        start = 0
        view = memoryview(tokens)
        for end in (np.flatnonzero(tokens == eot) + 1).tolist():
            yield view[start:end]
            start = end
        rest = tokens[start:]
