"""What a configuration trains on: one corpus, or the weighted corpora of a mixture."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from est_cli.config import DataConfig, SourceConfig
from est_cli.data import Say
from est_cli.data.corpora import Corpus, open_corpus
from est_cli.data.splits import Split, split_corpus
from est_cli.errors import UserError

_SOURCE_KEYS = ("path", "name", "split", "revision", "column")


@dataclass(frozen=True)
class Source:
    """A corpus and its share of the tokens; the shares of all sources add up to 1."""

    corpus: Corpus
    weight: float


def open_sources(data: DataConfig, say: Say) -> list[Source]:
    """The corpora that `data` names.

    Raises UserError with the problems of every source.
    """
    if data.streaming and data.kind != "hf":
        raise UserError(f"data.streaming=true: must be false for data={data.kind}; it is for data=hf")
    if not data.sources:
        return [Source(open_corpus(data, say), 1.0)]
    if data.kind != "hf":
        raise UserError(f"data.sources: must be empty for data={data.kind}; mixtures are for data=hf")
    if data.path is not None:
        raise UserError("data.path: must be null beside data.sources; give data.sources=[] to use the path alone")
    total = sum(source.weight for source in data.sources)
    sources: list[Source] = []
    problems: list[str] = []
    for i, source in enumerate(data.sources):
        try:
            with _naming_source(i):
                corpus = open_corpus(_data_of(data, source), say)
                getattr(corpus, "sizes", None)  # reads the rows, so that a problem is reported under its source
                sources.append(Source(corpus, source.weight / total))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems, _how_to_override(data.sources))
    return sources


def split_sources(sources: Sequence[Source], val_fraction: float) -> tuple[list[Split], list[Split]]:
    """Training and validation splits of the sources.

    Raises UserError where one cannot be split.
    """
    if len(sources) == 1:
        train, val = split_corpus(sources[0].corpus, val_fraction)
        return [train], [val]
    trains, vals = [], []
    for i, source in enumerate(sources):
        with _naming_source(i):
            train, val = split_corpus(source.corpus, val_fraction)
        trains.append(train)
        vals.append(val)
    return _without_leaks(trains, vals), vals


def sample_sources(sources: Sequence[Source], splits: Sequence[Split], n_bytes: int) -> list[str]:
    """About `n_bytes` of text at most, from every source its share."""
    samples = (split.sample(int(n_bytes * source.weight)) for source, split in zip(sources, splits, strict=True))
    return [text for sample in samples for text in sample]


def _data_of(data: DataConfig, source: SourceConfig) -> DataConfig:
    return dataclasses.replace(data, sources=(), **{key: getattr(source, key) for key in _SOURCE_KEYS})


@contextlib.contextmanager
def _naming_source(i: int) -> Iterator[None]:
    """A corpus calls its keys `data.path`, and so on: in a mixture they are those of source `i`."""
    try:
        yield
    except UserError as error:
        keys = "|".join(_SOURCE_KEYS)
        problems = (re.sub(rf"\bdata\.({keys})\b", rf"data.sources[{i}].\1", problem) for problem in error.problems)
        raise UserError(*(re.sub("^data=hf", f"data.sources[{i}]", problem) for problem in problems)) from None


def _how_to_override(sources: Sequence[SourceConfig]) -> str:
    """A list is overridden as a whole, which few people know by heart."""
    shown = [
        ",".join(
            f"{field.name}:{value}"
            for field in dataclasses.fields(source)
            if (value := getattr(source, field.name)) != field.default
        )
        for source in sources
    ]
    return f"data.sources: is overridden as a whole: 'data.sources=[{','.join(f'{{{source}}}' for source in shown)}]'"


def _without_leaks(trains: Sequence[Split], vals: Sequence[Split]) -> list[Split]:
    """Training splits without documents that stand in the validation split of another source."""
    held_out = [split.corpus.keys[split.documents] for split in vals]
    kept = []
    for i, split in enumerate(trains):
        others = np.concatenate([keys for j, keys in enumerate(held_out) if j != i])
        keys = split.corpus.keys[split.documents]
        keep = ~np.isin(keys, np.setdiff1d(others, held_out[i]))
        if not keep.any():
            raise UserError(f"data.sources[{i}]: all of its text is in the validation split of another source")
        kept.append(
            dataclasses.replace(
                split, documents=split.documents[keep], starts=split.starts[keep], ends=split.ends[keep]
            )
        )
    return kept
