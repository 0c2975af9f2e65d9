"""What a configuration trains on: one corpus, or the weighted corpora of a mixture."""

import dataclasses
import re
from collections.abc import Sequence
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
    corpus: Corpus
    weight: float
    """Share of the tokens; the weights of all sources add up to 1."""
    splits: tuple[Split, Split] | None = None


def open_sources(data: DataConfig, say: Say) -> list[Source]:
    """The corpora that `data` names.

    Raises UserError with the problems of every source.
    """
    if not data.sources:
        return [Source(open_corpus(data, say), 1.0)]
    if data.kind != "hf":
        raise UserError(f"data.sources: must be empty for data={data.kind}; mixtures are for data=hf")
    if data.path is not None:
        raise UserError("data.path: must be null beside data.sources; give data.sources=[] to use the path alone")
    total = sum(source.weight for source in data.sources)
    opened, problems = [], []
    for i, source in enumerate(data.sources):
        try:
            opened.append(Source(open_corpus(_data_of(data, source), say), source.weight / total))
        except UserError as error:
            problems += [_name_source(problem, i) for problem in error.problems]
    if problems:
        raise UserError(*problems, _how_to_override(data.sources))
    return opened


def split_sources(sources: Sequence[Source], data: DataConfig) -> dict[str, list[Split]]:
    """Training and validation splits of each source; no text of a validation split is in another's training split.

    Raises UserError where a source cannot be split.
    """
    splits = []
    for i, source in enumerate(sources):
        try:
            splits.append(split_corpus(source.corpus, data.val_fraction))
        except UserError as error:
            raise UserError(*(_name_source(problem, i) for problem in error.problems)) from None if data.sources else error
    return {}


def _data_of(data: DataConfig, source: SourceConfig) -> DataConfig:
    return dataclasses.replace(data, sources=(), **{key: getattr(source, key) for key in _SOURCE_KEYS})
