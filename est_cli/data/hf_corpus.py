"""The documents of data=hf: each row of a text column is one, from local files or from a dataset on the hub.

`HFCorpus` has all rows, memory-mapped; `StreamedCorpus` (data.streaming=true) reads them as they come.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import time
from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from est_cli.config import DataConfig
from est_cli.data import Say, disk, hub
from est_cli.data.corpora import Corpus, grouped, text_key
from est_cli.data.dataset_files import (
    BrokenRows,
    DatasetFile,
    check_column,
    describe_files,
    files_of_split,
    find_dataset_files,
    read_rows,
    text_bytes,
)
from est_cli.errors import RunFailed, UserError, first_line
from est_cli.files import replacing

_BATCH_BYTES = 16 << 20
_SAMPLED_BYTES = 1 << 16
_SAMPLES = 64
# Raise it when the same files would give other rows.
_ROWS_FORMAT = 1
_ROWS_KEPT_S = 30 * 24 * 3600
"""Rows that nobody has used for so long are deleted; they can be made again."""
_PART = re.compile(r"\s*([^\[\]+]+?)\s*(?:\[\s*(?:(-?\d+)(%?))?\s*:\s*(?:(-?\d+)(%?))?\s*\])?\s*")


class HFCorpus(Corpus):
    """All rows. Local files are only hashed until someone needs their rows."""

    def __init__(self, data: DataConfig, say: Say = lambda _: None):
        self._data = data
        files = find_dataset_files(data, say)
        self._local = LocalRows(data, files, say) if files else None
        if self._local:
            content = self._local.fingerprint
        else:
            content = [[split._fingerprint for split in self._splits], data.name, data.split, data.val_split]
        self.fingerprint = _digest([content, data.column])
        self.source = _describe_origin(data, bool(files))

    def __getstate__(self) -> dict:
        """For other processes, which map the tables again; pickling would copy the text itself."""
        mapped = ("_tables", "_column", "sizes", "keys")
        return {key: value for key, value in self.__dict__.items() if key not in mapped}

    def read(self, document: int, start: int, end: int) -> bytes:
        value = self._column[document].as_buffer()
        return b"" if value is None else value[start:end].to_pybytes()

    @cached_property
    def sizes(self) -> np.ndarray:
        return pc.fill_null(pc.binary_length(self._column), 0).to_numpy().astype(np.int64)

    @cached_property
    def keys(self) -> np.ndarray:
        values = (value for chunk in self._column.chunks for value in chunk.to_pylist())
        return np.frombuffer(b"".join(text_key(value or b"") for value in values), dtype="<u8")

    @cached_property
    def given_val(self) -> np.ndarray | None:
        if self._data.val_split is None:
            return None
        return np.repeat([False, True], [len(table) for table in self._tables])

    @cached_property
    def _column(self) -> pa.ChunkedArray:
        """The text of all splits, one after the other, memory-mapped."""
        return pa.chunked_array([chunk for table in self._tables for chunk in table.chunks], pa.large_binary())

    @cached_property
    def _tables(self) -> list[pa.ChunkedArray]:
        """The text of the training split, and of the validation split if one was named."""
        if self._local:
            return self._local.tables()
        column = self._data.column
        for split in self._splits:
            check_column(column, split.data.table.column_names)
        return [text_bytes(split.data.table.column(column), column) for split in self._splits]

    @cached_property
    def _splits(self) -> list:
        """The splits of a dataset on the hub."""
        return [hub.load_split(self._data, getattr(self._data, key)) for key in _split_keys(self._data)]


def _split_keys(data: DataConfig) -> list[str]:
    """The keys of `data` that name a split to read."""
    return ["split"] if data.val_split is None else ["split", "val_split"]


def _describe_origin(data: DataConfig, local: bool) -> dict:
    """What the manifest says about a dataset."""
    revision = None if local else hub.dataset_commit(disk.path_entries(data.path)[0], data.revision)
    facts = {key: getattr(data, key) for key in ("path", "name", "split", "val_split")}
    return {"kind": "hf", **facts, "revision": revision, "column": data.column}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class LocalRows:
    """The rows of the splits that `data` names, in the order of their files. The cache keeps them."""

    def __init__(self, data: DataConfig, files: list[DatasetFile], say: Say):
        self._data, self._say = data, say
        self._parts = [_parts(data, files, key) for key in _split_keys(data)]
        chosen = dict.fromkeys(file for own in self._parts for part, _, _ in own for file in part)
        say(describe_files(files, list(chosen)))
        self._digests = dict(zip(chosen, disk.hash_files([file.path for file in chosen]), strict=True))
        self.fingerprint = _digest(
            [[[self._key_of(part), low, high] for part, low, high in own] for own in self._parts]
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_say": None}

    def tables(self) -> list[pa.ChunkedArray]:
        """The text of each split, large_binary, memory-mapped."""
        tables = []
        for own in self._parts:
            chunks = []
            for files, low, high in own:
                column = self._mapped(files)
                first, end = _row(low, len(column), 0), _row(high, len(column), len(column))
                chunks += column.slice(first, max(0, end - first)).chunks
            tables.append(pa.chunked_array(chunks, pa.large_binary()))
        return tables

    def _mapped(self, files: list[DatasetFile]) -> pa.ChunkedArray:
        cached = disk.cache_folder(self._data) / f"rows-{self._key_of(files)[:16]}.arrow"
        if not cached.exists():
            with disk.writable_cache(self._data) as cache:
                self._write(files, cached)
                _prune(cache)
        with contextlib.suppress(OSError):  # a cache of someone else
            os.utime(cached)
        return pa.ipc.open_file(pa.memory_map(str(cached))).read_all().column(0)

    def _key_of(self, files: list[DatasetFile]) -> str:
        content = [[file.reader, self._digests[file].hex()] for file in files]
        return _digest([_ROWS_FORMAT, content, self._data.column, self._data.on_broken])

    def _write(self, files: list[DatasetFile], cached: Path) -> None:
        broken = BrokenRows(self._data.on_broken)
        n_rows = n_empty = 0
        schema = pa.schema([("text", pa.large_binary())])
        with replacing(cached) as partial, pa.ipc.new_file(str(partial), schema) as out:
            rows = (text for file in files for _, text in read_rows(file, self._data.column, broken))
            for texts in grouped(rows, lambda text: len(text or b"") + 16, _BATCH_BYTES):
                n_rows += len(texts)
                n_empty += sum(not text for text in texts)
                out.write_batch(pa.record_batch([pa.array(texts, pa.large_binary())], schema=schema))
        if n_empty:
            self._say(f"data: {n_empty:,} of {n_rows:,} rows hold no text, and are left out")
        if broken.count:
            self._say(f"data: left out {broken.count:,} broken rows, such as {broken.first}")


def _prune(folder: Path) -> None:
    """Deletes rows that were not used for a month. Processes that have mapped them keep them."""
    for rows in folder.glob("rows-*.arrow"):
        with contextlib.suppress(FileNotFoundError):  # another process may delete it too
            if rows.stat().st_mtime < time.time() - _ROWS_KEPT_S:
                rows.unlink()


Bound = tuple[int, bool] | None
"""A row number, and whether it is a percentage."""


def _parts(data: DataConfig, files: list[DatasetFile], key: str) -> list[tuple[list[DatasetFile], Bound, Bound]]:
    """The files and bounds that `data.split=train[:90%]+test` names."""
    value, parts = getattr(data, key), []
    for part in value.split("+"):
        match = _PART.fullmatch(part)
        if match is None:
            raise UserError(
                f"data.{key}={value}: must be a split, such as train, train[:1000], train[10%:] or train+test"
            )
        name, *bounds = match.groups()
        low, high = ((int(n), unit == "%") if n else None for n, unit in zip(bounds[::2], bounds[1::2], strict=True))
        parts.append((files_of_split(files, f"data.{key}={value}", name), low, high))
    return parts


def _row(bound: Bound, n_rows: int, default: int) -> int:
    if bound is None:
        return default
    number, is_percent = bound
    row = round(number * n_rows / 100) if is_percent else number
    return min(n_rows, max(0, row + n_rows if number < 0 else row))


class StreamedCorpus:
    """A dataset that is read while training goes on. Its fingerprint covers only a sample of local files' bytes."""

    def __init__(self, data: DataConfig, say: Say = lambda _: None):
        self._data, self._say = data, say
        self._files = find_dataset_files(data, say)
        # Report now what is missing, while the caller knows which source it is.
        splits = [self._open(key) for key in _split_keys(data)]
        if self._files:
            say(describe_files(self._files, splits[0].files))
        self.source = {**_describe_origin(data, bool(self._files)), "streaming": True}
        sampled = [_sampled_fingerprint(split.files) for split in splits] if self._files else None
        self.fingerprint = _digest([sampled, data.column] if sampled else self.source)

    def training_texts(self, held_out: Container[bytes]) -> "TextStream":
        """Without the texts whose keys are in `held_out`."""
        return TextStream(self._open("split"), self._data, held_out)

    def val_texts(self) -> "TextStream":
        """The texts of the source's own validation split; the training texts if none was named."""
        return TextStream(self._open(_split_keys(self._data)[-1]), self._data)

    def _open(self, key: str) -> Any:
        """A split, as a dataset with the methods of `datasets.IterableDataset` that `TextStream` uses."""
        if self._files:
            return StreamedFiles(self._data, self._files, key, self._say)
        return hub.load_split(self._data, getattr(self._data, key), streaming=True)


def _sampled_fingerprint(files: Sequence[DatasetFile]) -> str:
    """For files that are too large to read before training: their sizes, and bytes from all over each."""
    return _digest([[file.reader, file.path.stat().st_size, _sample(file.path)] for file in files])


def _sample(file: Path) -> str:
    last = max(0, file.stat().st_size - _SAMPLED_BYTES)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for i in range(_SAMPLES):
            stream.seek(last * i // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()


class StreamedFiles:
    """The rows of local files as they come. A position stays valid as long as the files do not change."""

    def __init__(self, data: DataConfig, files: list[DatasetFile], key: str, say: Say):
        self._column, self._broken, self._say = data.column, BrokenRows(data.on_broken, say), say
        parts = _parts(data, files, key)
        if any((low, high) != (None, None) for _, low, high in parts):
            raise UserError(f"data.{key}={getattr(data, key)}: a stream has no length; must be the name of a split")
        self.files = [file for part, _, _ in parts for file in part]
        self._position, self._told = {"file": 0, "row": 0}, False

    def __iter__(self) -> Iterator[dict[str, str | None]]:
        first, start = self._position["file"], self._position["row"]
        for i, file in enumerate(self.files[first:], first):
            for row, text in read_rows(file, self._column, self._broken, start):
                self._position = {"file": i, "row": row}
                yield {self._column: self._decoded(text) if text else None}
            start = 0

    def state_dict(self) -> dict:
        return self._position

    def load_state_dict(self, state: dict) -> None:
        self._position = state

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            if not self._told:
                self._say("data: the stream holds invalid UTF-8, which is replaced by U+FFFD; this is told once")
            self._told = True
            return text.decode("utf-8", "replace")


class TextStream:
    """The texts of a dataset without empty ones and those of validation. Starts again at the end."""

    def __init__(self, dataset: Any, data: DataConfig, held_out: Container[bytes] = ()):
        self._dataset, self._data, self._held_out = dataset, data, held_out
        self._start = self.position()
        self._pass = self._texts()

    def one_pass(self) -> Iterator[str]:
        """All texts once, from the current position."""
        return self._pass

    def next(self, count: int) -> list[str]:
        """The next texts: at least one, at most `count`; a list does not cross the end of the dataset.

        Raises UserError if the whole dataset has none.
        """
        for _ in range(2):
            texts = [text for _, text in zip(range(count), self._pass, strict=False)]
            if texts:
                return texts
            self.go_to(self._start)
        raise UserError("data=hf: holds no text")

    def position(self) -> dict:
        """Plain data for `go_to`."""
        return copy.deepcopy(self._dataset.state_dict())

    def go_to(self, position: dict) -> None:
        self._dataset.load_state_dict(position)
        self._pass = self._texts()

    def _texts(self) -> Iterator[str]:
        column = self._data.column
        try:
            for row in self._dataset:
                check_column(column, list(row))
                if not isinstance(row[column], str | None):
                    kind = type(row[column]).__name__
                    raise UserError(f"data.column={column}: must be a column of text, and holds {kind}")
                if row[column] and text_key(row[column].encode("utf-8", "replace")) not in self._held_out:
                    yield row[column]
        except UserError:
            raise
        except Exception as error:  # The library passes on exceptions of pyarrow, httpx and others.
            raise RunFailed(f"data.path={self._data.path}: the stream broke off ({first_line(error)})") from None
