"""Training and validation: the sources of a run, the documents that each split gets, and their text in pieces.

Documents are ordered by a hash of their content. The split therefore does not depend on paths or names, and equal
documents are on the same side: validation leaks nothing. If a corpus has groups, they are ordered instead, and each
group is on one side. If the source names its own validation split, that is used as it is.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from est_cli.config import DataConfig, SourceConfig
from est_cli.data import Say
from est_cli.data.corpora import Corpus, FileCorpus, PackageCorpus, Source, find_stdlib_files, find_text_files
from est_cli.errors import UserError, collecting

PIECE_BYTES = 1 << 20
"""A longer document is read in pieces of about this size."""
SAMPLE_BLOCK_BYTES = 1 << 16
_CUT_WINDOW_BYTES = 1 << 16
_GROUP_SHARE = 4
"""A group is at most 1/4 of validation, so that no single package decides the loss."""
_SOURCE_KEYS = ("path", "name", "split", "revision", "column")


def open_sources(data: DataConfig, say: Say) -> list[Source]:
    """The corpora that `data` names, one or the weighted ones of a mixture.

    Raises UserError with the problems of every source.
    """
    if not data.sources:
        return [Source(open_corpus(data, say), 1.0)]
    total = sum(source.weight for source in data.sources)
    sources: list[Source] = []
    problems: list[str] = []
    for i, source in enumerate(data.sources):
        own = dataclasses.replace(data, sources=(), **{key: getattr(source, key) for key in _SOURCE_KEYS})
        with collecting(problems), _naming_source(i):
            corpus = open_corpus(own, say)
            getattr(corpus, "sizes", None)  # reads the rows, so that errors name the source
            sources.append(Source(corpus, source.weight / total))
    if problems:
        raise UserError(*problems, _how_to_override(data.sources))
    return sources


def open_corpus(data: DataConfig, say: Say) -> Corpus:
    """The documents that `data` names. Raises UserError if there are none."""
    if data.kind == "stdlib":
        return FileCorpus(*find_stdlib_files())
    if data.kind == "packages":
        return PackageCorpus(say)
    if data.kind == "text":
        return FileCorpus(find_text_files(data.path, say), {"kind": "text", "path": data.path})
    from est_cli.data.hf_corpus import HFCorpus, StreamedCorpus  # pyarrow, which only data=hf needs

    return StreamedCorpus(data, say) if data.streaming else HFCorpus(data, say)


@contextlib.contextmanager
def _naming_source(i: int) -> Iterator[None]:
    """Rewrites the keys in errors: a corpus says `data.path`, in a mixture that is `data.sources[i].path`."""
    try:
        yield
    except UserError as error:
        keys = "|".join(_SOURCE_KEYS)
        problems = (re.sub(rf"\bdata\.({keys})\b", rf"data.sources[{i}].\1", problem) for problem in error.problems)
        raise UserError(*(re.sub("^data=hf", f"data.sources[{i}]", problem) for problem in problems)) from None


def _how_to_override(sources: Sequence[SourceConfig]) -> str:
    """The whole list as an override: Hydra cannot override a part of a list, which few people know."""
    shown = [
        ",".join(
            f"{field.name}:{value}"
            for field in dataclasses.fields(source)
            if (value := getattr(source, field.name)) != field.default
        )
        for source in sources
    ]
    return f"data.sources: is overridden as a whole: 'data.sources=[{','.join(f'{{{source}}}' for source in shown)}]'"


class Piece(NamedTuple):
    """Consecutive text of one document."""

    text: str
    n_bytes: int
    """UTF-8 bytes of `text`."""
    continued: bool
    """Not the document's first piece."""
    last: bool
    replaced: int
    """Invalid UTF-8 sequences that became U+FFFD."""


@dataclass(frozen=True)
class Split:
    """Documents of a corpus (or parts of them, if a document was cut), in its order.

    Equal numbers that follow each other are parts of one document.
    """

    corpus: Corpus
    documents: np.ndarray
    starts: np.ndarray
    """First byte of each document that belongs to the split."""
    ends: np.ndarray
    continued: bool = False
    """The first document starts in the shard before this one."""
    cut: bool = False
    """The last document continues in the next shard."""

    @property
    def n_documents(self) -> int:
        """Documents that end here."""
        return int(np.count_nonzero(np.diff(self.documents))) + (len(self.documents) > 0 and not self.cut)

    @property
    def n_bytes(self) -> int:
        return int((self.ends - self.starts).sum())

    def pieces(self) -> Iterator[Piece]:
        """All text, in order. Holds about `PIECE_BYTES` of it at a time."""
        changes = (np.diff(self.documents) != 0).tolist()
        continue_earlier = [self.continued, *(not change for change in changes)]
        are_last = [*changes, not self.cut]
        places = zip(self.documents.tolist(), self.starts.tolist(), self.ends.tolist(), strict=True)
        for (document, start, end), continued, last in zip(places, continue_earlier, are_last, strict=False):
            yield from self._document_pieces(document, start, end, continued, last)

    def shards(self, n_bytes: int) -> list["Split"]:
        """Consecutive parts of about `n_bytes`, less than three times that. Cuts longer documents as `pieces` does."""
        documents, starts, ends = self._cut_long(n_bytes)
        sizes = ends - starts
        numbers = (np.cumsum(sizes) - sizes) // n_bytes
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
        inside = np.concatenate([[False], documents[1:] == documents[:-1], [False]])
        return [
            Split(self.corpus, documents[a:b], starts[a:b], ends[a:b], bool(inside[a]), bool(inside[b]))
            for a, b in itertools.pairwise([*firsts.tolist(), len(documents)])
        ]

    def _document_pieces(self, document: int, start: int, end: int, continued: bool, last: bool) -> Iterator[Piece]:
        rest, position = b"", start
        while position < end:
            step = min(PIECE_BYTES, end - position)
            data = rest + self.corpus.read(document, position, position + step)
            position += step
            cut = len(data) if position == end else _cut(data)
            data, rest = data[:cut], data[cut:]
            text = data.decode("utf-8", "replace")
            replaced = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")  # U+FFFD can be in the text itself
            n_bytes = len(text.encode("utf-8")) if replaced else len(data)
            yield Piece(text, n_bytes, continued, last and position == end, replaced)
            continued = True

    def sample(self, n_bytes: int) -> list[str]:
        """At most about `n_bytes` of text, in blocks spread evenly over the split."""
        if self.n_bytes <= n_bytes:
            return [piece.text for piece in self.pieces()]
        offsets = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        block = min(SAMPLE_BLOCK_BYTES, max(1, n_bytes // 16))
        firsts = np.linspace(0, self.n_bytes - block, n_bytes // block).astype(np.int64)
        return [text for first in firsts for text in self._range(offsets, int(first), int(first) + block)]

    def _range(self, offsets: np.ndarray, first: int, end: int) -> Iterator[str]:
        """Text of bytes range(first, end) of the concatenated documents, without broken characters."""
        low = np.searchsorted(offsets, first, side="right") - 1
        high = np.searchsorted(offsets, end, side="left")
        for i in range(low, high):
            shift = int(self.starts[i] - offsets[i])
            start, stop = max(first + shift, int(self.starts[i])), min(end + shift, int(self.ends[i]))
            yield self.corpus.read(int(self.documents[i]), start, stop).decode("utf-8", "ignore")

    def _cut_long(self, n_bytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, starts and ends of parts that are at most little longer than `n_bytes`."""
        long = np.flatnonzero(self.ends - self.starts > n_bytes)
        cuts = [self._cuts(int(self.documents[i]), int(self.starts[i]), int(self.ends[i]), n_bytes) for i in long]
        places = np.repeat(long, [len(own) for own in cuts])
        inside = np.array([cut for own in cuts for cut in own], dtype=np.int64)
        return (
            np.insert(self.documents, places, self.documents[places]),
            np.insert(self.starts, places + 1, inside),
            np.insert(self.ends, places, inside),
        )

    def _cuts(self, document: int, start: int, end: int, n_bytes: int) -> list[int]:
        window = min(_CUT_WINDOW_BYTES, n_bytes)
        windows = range(start + n_bytes - window, end - window, n_bytes)
        return [first + _cut(self.corpus.read(document, first, first + window)) for first in windows]


def split_sources(sources: Sequence[Source], val_fraction: float) -> tuple[list[Split], list[Split]]:
    """Training and validation splits of the sources. Raises UserError if one cannot be split."""
    trains, vals = [], []
    for i, source in enumerate(sources):
        with _naming_source(i) if len(sources) > 1 else contextlib.nullcontext():
            train, val = split_corpus(source.corpus, val_fraction)
        trains.append(train)
        vals.append(val)
    return _without_leaks(trains, vals) if len(sources) > 1 else trains, vals


def _without_leaks(trains: Sequence[Split], vals: Sequence[Split]) -> list[Split]:
    """Training splits without documents that are in the validation split of another source."""
    held_out = [split.corpus.keys[split.documents] for split in vals]
    kept = []
    for i, split in enumerate(trains):
        others = np.concatenate([keys for j, keys in enumerate(held_out) if j != i])
        keys = split.corpus.keys[split.documents]
        keep = ~np.isin(keys, np.setdiff1d(others, held_out[i]))
        if not keep.any():
            raise UserError(f"data.sources[{i}]: all of its text is in the validation split of another source")
        kept.append(Split(split.corpus, split.documents[keep], split.starts[keep], split.ends[keep]))
    return kept


def split_corpus(corpus: Corpus, val_fraction: float) -> tuple[Split, Split]:
    """Training and validation splits, neither empty; validation gets about `val_fraction` of the bytes.

    If whole documents cannot make up that share (there is only one, or they are too long), validation is the tail of
    the longest document, starting at a new line if possible.

    Raises UserError if the corpus is too short to be split, or its groups are too large.
    """
    filled = corpus.sizes > 0
    if not filled.any():
        raise UserError(f"data={corpus.source['kind']}: holds no text")
    if corpus.given_val is not None:
        in_val = corpus.given_val
    else:
        budget = max(1, int(val_fraction * corpus.sizes.sum()))
        in_val = _draw_validation(corpus, filled, budget)
        if in_val is None and corpus.groups is not None:
            raise UserError(
                f"data.val_fraction={val_fraction}: comes to {budget} bytes, and too few packages of "
                f"data={corpus.source['kind']} have a quarter of that or less; use a larger fraction, up to 0.5, "
                "or install more packages"
            )
        if in_val is None:
            return _cut_tail(corpus, filled, budget)
    train, val = _whole(corpus, filled & ~in_val), _whole(corpus, filled & in_val)
    for name, split in (("training", train), ("validation", val)):
        if not split.n_bytes:
            raise UserError(f"data={corpus.source['kind']}: the {name} split holds no text")
    return train, val


def _draw_validation(corpus: Corpus, filled: np.ndarray, budget: int) -> np.ndarray | None:
    """Which documents validation gets, or None if whole groups come to less than half of `budget`."""
    largest = budget if corpus.groups is None else budget // _GROUP_SHARE
    keys, group = np.unique(corpus.keys if corpus.groups is None else corpus.groups, return_inverse=True)
    group_bytes = np.bincount(group, weights=corpus.sizes, minlength=len(keys)).astype(np.int64)
    fitting = np.flatnonzero((group_bytes > 0) & (group_bytes <= largest))
    drawn_bytes = np.cumsum(group_bytes[fitting])
    if not len(fitting) or drawn_bytes[-1] < budget / 2:
        return None
    n_drawn = int(np.argmin(np.abs(drawn_bytes - budget))) + 1
    return filled & np.isin(group, fitting[:n_drawn])


def _whole(corpus: Corpus, chosen: np.ndarray) -> Split:
    documents = np.flatnonzero(chosen)
    return Split(corpus, documents, np.zeros(len(documents), np.int64), corpus.sizes[documents])


def _cut_tail(corpus: Corpus, filled: np.ndarray, budget: int) -> tuple[Split, Split]:
    train = _whole(corpus, filled)
    longest = int(np.argmax(corpus.sizes))
    size = int(corpus.sizes[longest])
    cut = _cut_position(corpus, longest, size, min(budget, size // 2)) if size > 1 else 0
    if not 0 < cut < size:
        raise UserError(f"data={corpus.source['kind']}: {size} bytes of text are too few to keep some for validation")
    val = Split(corpus, np.array([longest]), np.array([cut]), np.array([size]))
    return Split(corpus, train.documents, train.starts, np.where(train.documents == longest, cut, train.ends)), val


def _cut_position(corpus: Corpus, document: int, size: int, tail_bytes: int) -> int:
    """Where the last `tail_bytes` begin: after a newline in their first half, or else between two characters."""
    first = size - tail_bytes
    for start in range(first, size - tail_bytes // 2, PIECE_BYTES):
        data = corpus.read(document, start, min(start + PIECE_BYTES, size - tail_bytes // 2))
        if (newline := data.find(b"\n")) >= 0 and start + newline + 1 < size:
            return start + newline + 1
    near = max(0, first - 3)
    return near + _last_character(corpus.read(document, near, first + 1))


def _cut(data: bytes) -> int:
    """Where to cut `data`, which continues: after a newline or else before a space, so that few tokens change."""
    newline, space = data.rfind(b"\n") + 1, max(0, data.rfind(b" "))
    return newline or space or _last_character(data)


def _last_character(data: bytes) -> int:
    """Offset at which the last character of `data` begins, complete or not."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data) - 1
