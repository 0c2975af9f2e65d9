"""Text of the local files of a dataset: in one Arrow file that is memory-mapped, or as a stream."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.cache import cache_folder
from est_cli.data.dataset_files import DatasetFile, describe_files, files_of_split
from est_cli.data.row_readers import read_rows, refuse_broken
from est_cli.data.text_files import hash_files
from est_cli.errors import UserError

_BATCH_BYTES = 16 << 20
_SAMPLED_BYTES = 1 << 16
_SAMPLES = 64
# Raise it when the same files would no longer give the same rows.
_FORMAT = 1
_PART = re.compile(r"\s*([^\[\]+]+?)\s*(?:\[\s*(?:(-?\d+)(%?))?\s*:\s*(?:(-?\d+)(%?))?\s*\])?\s*")


class LocalRows:
    """The rows of the splits that `data` names, in the order of their files."""

    def __init__(self, data: DataConfig, files: list[DatasetFile], say: Say):
        self._data, self._say = data, say
        self._parts = [
            [(files_of_split(files, f"data.{key}={value}", name), low, high) for name, low, high in _parts(key, value)]
            for key in ("split", "val_split")
            if (value := getattr(data, key)) is not None
        ]
        chosen = dict.fromkeys(file for own in self._parts for part, _, _ in own for file in part)
        say(describe_files(files, list(chosen)))
        self._digests = dict(zip(chosen, hash_files([file.path for file in chosen]), strict=True))
        self.fingerprint = _digest([[self._key_of(part), low, high] for part, low, high in own] for own in self._parts)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_say": None}

    def tables(self) -> list:
        """The text of each split, large_binary (pyarrow.ChunkedArray), memory-mapped."""
        import pyarrow as pa

        tables = []
        for own in self._parts:
            chunks = []
            for files, low, high in own:
                column = self._mapped(files)
                first, end = _row(low, len(column), 0), _row(high, len(column), len(column))
                chunks += column.slice(first, max(0, end - first)).chunks
            tables.append(pa.chunked_array(chunks, pa.large_binary()))
        return tables

    def _mapped(self, files: list[DatasetFile]):
        import pyarrow as pa

        cached = cache_folder(self._data) / f"rows-{self._key_of(files)[:16]}.arrow"
        if not cached.exists():
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                self._write(files, cached)
            except OSError as error:
                raise UserError(
                    f"data.cache_dir={cached.parent}: cannot be written ({error.strerror or error}); "
                    "must be a folder with room that you may write to"
                ) from None
        return pa.ipc.open_file(pa.memory_map(str(cached))).read_all().column(0)

    def _key_of(self, files: list[DatasetFile]) -> str:
        content = [[file.reader, self._digests[file].hex()] for file in files]
        return _digest([_FORMAT, content, self._data.column, self._data.on_broken])

    def _write(self, files: list[DatasetFile], cached: Path) -> None:
        import pyarrow as pa

        broken = Broken(self._data.on_broken)
        partial = cached.with_suffix(f".{os.getpid()}")
        n_rows = n_empty = 0
        schema = pa.schema([("text", pa.large_binary())])
        try:
            with pa.ipc.new_file(str(partial), schema) as out:
                for texts in _batches(files, self._data.column, broken):
                    n_rows += len(texts)
                    n_empty += sum(not text for text in texts)
                    out.write_batch(pa.record_batch([pa.array(texts, pa.large_binary())], schema=schema))
            os.replace(partial, cached)
        finally:
            partial.unlink(missing_ok=True)
        if n_empty:
            self._say(f"data: {n_empty:,} of {n_rows:,} rows hold no text, and are left out")
        if broken.count:
            self._say(f"data: left out {broken.count:,} broken rows, such as {broken.first}")


class LocalTexts:
    """The texts of local files as they come. A position is plain data, and holds while the files do."""

    def __init__(self, data: DataConfig, files: list[DatasetFile], key: str, say: Say):
        value = getattr(data, key)
        self._column, self._broken = data.column, Broken(data.on_broken, say)
        self.files = []
        for name, low, high in _parts(key, value):
            if (low, high) != (None, None):
                raise UserError(f"data.{key}={value}: a stream has no length; must be the name of a split")
            self.files += files_of_split(files, f"data.{key}={value}", name)
        self._position = (0, 0)

    def __iter__(self) -> Iterator[bytes | None]:
        first, start = self._position
        for i, file in enumerate(self.files[first:], first):
            for row, text in read_rows(file, self._column, self._broken, start):
                self._position = (i, row)
                yield text
            start = 0

    def state_dict(self) -> dict:
        return {"file": self._position[0], "row": self._position[1]}

    def load_state_dict(self, state: dict) -> None:
        self._position = state["file"], state["row"]


class Broken:
    """Refuses broken rows, or with data.on_broken=skip counts them, and tells the first where there is a `say`."""

    def __init__(self, on_broken: str, say: Say | None = None):
        self._skips, self._say = on_broken == "skip", say
        self.count, self.first = 0, ""

    def __call__(self, reason: str) -> None:
        if not self._skips:
            refuse_broken(reason)
        if not self.count:
            self.first = reason
            if self._say is not None:
                self._say(f"data: left out a broken row, {reason}; others are left out without a word")
        self.count += 1


def sampled_fingerprint(files: Sequence[DatasetFile]) -> str:
    """Of files that are too large to be read before training: their sizes, and bytes from all over each."""
    return _digest([file.reader, file.path.stat().st_size, _sample(file.path)] for file in files)


def _sample(file: Path) -> str:
    size = file.stat().st_size
    last = max(0, size - _SAMPLED_BYTES)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for i in range(_SAMPLES):
            stream.seek(last * i // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _batches(files: Sequence[DatasetFile], column: str, broken: Broken) -> Iterator[list[bytes | None]]:
    texts: list[bytes | None] = []
    n_bytes = 0
    for file in files:
        for _, text in read_rows(file, column, broken):
            texts.append(text)
            n_bytes += len(text or b"") + 16
            if n_bytes >= _BATCH_BYTES:
                yield texts
                texts, n_bytes = [], 0
    yield texts


def _parts(key: str, value: str) -> list[tuple[str, Any, Any]]:
    """`train[:90%]+test` as names with bounds: None, or a number and whether it is one of percent."""
    parts = []
    for part in value.split("+"):
        match = _PART.fullmatch(part)
        if match is None:
            raise UserError(
                f"data.{key}={value}: must be a split, such as train, train[:1000], train[10%:] or train+test"
            )
        name, *bounds = match.groups()
        low, high = ((int(n), unit == "%") if n else None for n, unit in zip(bounds[::2], bounds[1::2], strict=True))
        parts.append((name, low, high))
    return parts


def _row(bound: tuple[int, bool] | None, n_rows: int, default: int) -> int:
    if bound is None:
        return default
    number, is_percent = bound
    row = round(number * n_rows / 100) if is_percent else number
    return min(n_rows, max(0, row + n_rows if number < 0 else row))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content if isinstance(content, list) else list(content)).encode()).hexdigest()
