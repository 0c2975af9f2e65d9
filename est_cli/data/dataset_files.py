"""The local files of data=hf: which ones are read, in which order, for which split, and their rows.

A file or glob that is named holds training text. In a folder, each file belongs to the split that its path names
(`test/a.jsonl`, `a.test.jsonl`, `validation-00000-of-00002.parquet`), or to `train`; a README.md with `configs`, as
folders from the hub have, takes precedence. A folder written by `save_to_disk` is read as it was saved.

Rows are bytes as they stand in the file, so that invalid UTF-8 can be replaced and counted when they are decoded.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from est_cli.config import DataConfig
from est_cli.data import Say, disk
from est_cli.errors import UserError, first_line, nearest

_READERS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".arrow": "arrow",
}
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(_SPLIT_WORDS)})(?=[-._ 0-9]|$)")
_NUMBERED = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.")
"""How the hub names the files of a split, in its folder `data`."""


@dataclass(frozen=True)
class DatasetFile:
    path: Path
    reader: str
    split: str


def find_dataset_files(data: DataConfig, say: Say) -> list[DatasetFile]:
    """The files of every split that `data.path` names, each once; none if it is a name on the hub.

    Raises UserError if a path is missing or holds nothing that can be read.
    """
    entries = disk.path_entries(data.path)
    files: dict[str, DatasetFile] = {}
    skipped: disk.Skipped = defaultdict(list)
    for entry in entries:
        found = _expand(entry, data.name, skipped)
        if not found and (len(entries) > 1 or _must_be_local(entry)):
            raise disk.no_such_path(entry)
        for file in found:
            if os.path.realpath(file.path) in files:
                skipped["named twice"].append(file.path)
            files.setdefault(os.path.realpath(file.path), file)
    disk.tell_skipped(skipped, say)
    return list(files.values())


def files_of_split(files: list[DatasetFile], key: str, name: str) -> list[DatasetFile]:
    """The files of a split. `key` is the setting that named it.

    Raises UserError with the splits that exist.
    """
    for alias in (name, _SPLIT_WORDS.get(name, name)):
        if chosen := [file for file in files if file.split == alias]:
            return chosen
    splits = {file.split: file for file in reversed(files)}
    there = ", ".join(f"'{split}' ({disk.show_file(file.path)})" for split, file in sorted(splits.items()))
    raise UserError(
        f"{key}: must be a split of the files, which is one of {there}{nearest(alias, splits)}. Files in a folder "
        "belong to the split that they are named for; files that data.path names are of 'train'"
    )


def describe_files(files: list[DatasetFile], chosen: list[DatasetFile]) -> str:
    """A line that says which of the files are read, and which belong to other splits."""
    readers = Counter(file.reader for file in chosen)
    others = Counter(file.split for file in files if file not in chosen)
    what = ", ".join(f"{count} {reader}" for reader, count in sorted(readers.items()))
    left_out = ", ".join(f"{count} of split {split}" for split, count in sorted(others.items()))
    return f"data: reads {disk.count_files(chosen)} ({what}) in the order of their names" + (
        f"; left out: {left_out}" if left_out else ""
    )


def _expand(entry: str, name: str | None, skipped: disk.Skipped) -> list[DatasetFile]:
    path = os.path.expanduser(entry)
    if os.path.isdir(path):
        files = _saved(Path(path)) or _readable(_in_folder(Path(path), name), skipped)
        if not files:
            raise UserError(f"data.path={entry}: the folder holds no {disk.FORMATS} files")
        return files
    is_file = os.path.isfile(path)
    matches = [Path(path)] if is_file else disk.matching(path)
    if name is not None and matches:
        raise UserError(f"data.name={name}: must be null for files; it names a part of a dataset on the hub")
    if is_file and reader_of(matches[0]) is None:
        raise UserError(f"data.path={entry}: must be {disk.FORMATS} files (also {', '.join(sorted(_OPENERS))})")
    files = _readable(((file, "train") for file in matches), skipped)
    if matches and not files:
        raise UserError(f"data.path={entry}: matches no {disk.FORMATS} files")
    return files


def _readable(files: Iterable[tuple[Path, str]], skipped: disk.Skipped) -> list[DatasetFile]:
    return [
        DatasetFile(file, reader_of(file), split)
        for file, split in files
        if disk.is_readable(file, reader_of, "of other formats", skipped)
    ]


def _saved(root: Path) -> list[DatasetFile]:
    """The files of a dataset that `save_to_disk` wrote; none if it did not write this folder."""
    folders = {"train": root} if (root / "state.json").is_file() else {}
    if (root / "dataset_dict.json").is_file():
        folders = {split: root / split for split in _read_json(root / "dataset_dict.json")["splits"]}
    return [
        DatasetFile(folder / part["filename"], "arrow", split)
        for split, folder in folders.items()
        for part in _read_json(folder / "state.json")["_data_files"]
    ]


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: cannot read {file} ({error})") from None


def _in_folder(root: Path, name: str | None) -> Iterable[tuple[Path, str]]:
    """The files of a folder and their splits: those that its README.md declares for the subset `name`, or all."""
    configs = {config["config_name"]: config for config in _configs(root)}
    if not configs and name is not None:
        raise UserError(f"data.name={name}: must be null; {root} has no README.md that declares `configs`")
    if name is None and configs:
        marked = [own for own, config in configs.items() if config.get("default")]
        name = marked[0] if marked else "default" if "default" in configs or len(configs) > 1 else next(iter(configs))
    if name is not None and name not in configs:
        raise UserError(f"data.name={name}: must be one of {', '.join(configs)}{nearest(name, configs)}")
    declared = configs[name].get("data_files") if configs else None
    if declared is None:
        return ((file, split_of(file.relative_to(root))) for file in disk.walk(str(root)))
    if not isinstance(declared, list) or not all(isinstance(part, dict) for part in declared):
        declared = [{"split": "train", "path": declared}]
    return (
        (file, str(part["split"]))
        for part in declared
        for pattern in ([part["path"]] if isinstance(part["path"], str) else part["path"])
        for file in disk.matching(os.path.join(glob.escape(str(root)), pattern))
    )


def _configs(root: Path) -> list[dict]:
    """The subsets that the folder's README.md declares."""
    try:
        configs = (huggingface_hub.metadata_load(root / "README.md") or {}).get("configs")
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [config for config in configs or [] if isinstance(config, dict) and "config_name" in config]


def split_of(file: Path) -> str:
    """The split that a path inside a folder names; the outermost part that names one decides. Default: `train`."""
    numbered = _NUMBERED.match(file.name)
    if numbered and file.parent.name == "data":
        return _SPLIT_WORDS.get(numbered[1], numbered[1])
    for part in file.parts:
        if word := _WORD.search(part.lower()):
            return _SPLIT_WORDS[word[1]]
    return "train"


def reader_of(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return _READERS.get(suffixes[-1]) if suffixes else None


def _must_be_local(entry: str) -> bool:
    """Whether a missing path cannot be a name on the hub: those are OWNER/NAME."""
    return bool(
        reader_of(Path(entry)) or glob.has_magic(entry) or entry.count("/") > 1 or entry.startswith((".", "~", os.sep))
    )


Rows = Iterator[tuple[int, bytes | None]]
"""Position and text of each row; None for a row without text."""

_ROWS_WITHOUT_COLUMN = 1000
"""Writers omit the keys of empty values. A file whose first rows all lack the column does not have it."""
_SHOWN_CHARACTERS = 40
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}


class BrokenRows:
    """Counts rows that cannot be read. It is called with the problem of each row.

    Raises UserError unless data.on_broken=skip. With `say` it also tells the first problem.
    """

    def __init__(self, on_broken: str, say: Say | None = None):
        self._skips, self._say = on_broken == "skip", say
        self.count, self.first = 0, ""

    def __call__(self, problem: str) -> None:
        if not self._skips:
            raise UserError(f"{problem}; data.on_broken=skip leaves broken rows out and counts them")
        if not self.count:
            self.first = problem
            if self._say is not None:
                self._say(f"data: left out a broken row, {problem}; further ones are left out silently")
        self.count += 1


def read_rows(file: DatasetFile, column: str, broken: BrokenRows, start: int = 0) -> Rows:
    """The rows after position `start`.

    Raises UserError if the file cannot be read.
    """
    try:
        yield from getattr(_Reader(file.path, column, broken, start), file.reader)()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pyarrow and each decompressor have their own exceptions.
        raise UserError(f"data.path={file.path}: cannot be read as {file.reader} ({first_line(error)})") from None


def check_column(name: str, names: list[str], place: str = "") -> None:
    if name not in names:
        # The first line of a file without a header can be a whole document.
        shown = [own if len(own) <= _SHOWN_CHARACTERS else f"{own[:_SHOWN_CHARACTERS]}…" for own in names]
        raise UserError(f"data.column={name}: must be one of {', '.join(shown)}{place}{nearest(name, shown)}")


def text_bytes(values: Any, name: str, place: str = "") -> Any:
    """A pyarrow column as large_binary. Raises UserError if it does not hold text."""
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.binary_view())
    elif not (
        pa.types.is_null(values.type) or pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    ):
        raise UserError(f"data.column={name}: must be a column of text, and holds {values.type}{place}")
    return values.cast(pa.large_binary())


@dataclass(frozen=True)
class _Reader:
    """Reads one file. The method that a format is named for yields the rows after position `start`."""

    file: Path
    column: str
    broken: BrokenRows
    start: int

    def parquet(self) -> Rows:
        with self._opened() as stream:
            table = pq.ParquetFile(stream)
            self._check_column(table.schema_arrow.names)
            row = 0
            for group in range(table.num_row_groups):
                n_rows = table.metadata.row_group(group).num_rows
                if row + n_rows > self.start:
                    batches = table.iter_batches(1024, row_groups=[group], columns=[self.column])
                    yield from self._rows_of(batches, row)
                row += n_rows

    def arrow(self) -> Rows:
        with self._opened() as stream:
            try:
                table = pa.ipc.open_file(stream)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            except pa.ArrowInvalid:
                stream.seek(0)
                table = batches = pa.ipc.open_stream(stream)
            self._check_column(table.schema.names)
            yield from self._rows_of(batches, 0)

    def _rows_of(self, batches: Iterable[pa.RecordBatch], row: int) -> Rows:
        for batch in batches:
            values = batch.column(batch.schema.get_field_index(self.column))
            for text in text_bytes(values, self.column, f" in {self.file}").to_pylist():
                row += 1
                if row > self.start:
                    yield row, text

    def jsonl(self) -> Rows:
        with self._opened() as stream:
            lines = ((n, _parse(line)) for n, line in enumerate(stream, 1) if n > self.start and line.strip())
            yield from self._texts_of(lines, "line")

    def json(self) -> Rows:
        """Lines of JSON, a list of objects, one object, or an object that holds the column as a list."""
        with self._opened() as stream:
            filled = (line for line in stream if line.strip())
            first, second = next(filled, b""), next(filled, None)
        whole = None
        if second is None or not isinstance(_parse(first), dict):
            with self._opened() as stream:
                whole = _parse(stream.read())
        if isinstance(whole, dict):
            texts = whole.get(self.column)
            whole = [{self.column: text} for text in texts] if isinstance(texts, list) else [whole]
        if isinstance(whole, list):
            yield from self._texts_of(((i, entry) for i, entry in enumerate(whole, 1) if i > self.start), "entry")
        else:
            yield from self.jsonl()

    def _texts_of(self, objects: Iterable[tuple[int, Any]], unit: str) -> Rows:
        names: dict[str, None] = {}
        seen, waiting = self.start > 0, 0
        for number, row in objects:
            place = f"data.path={self.file}, {unit} {number}"
            if isinstance(row, ValueError):
                self.broken(f"{place}: is no JSON ({row})")
            elif not isinstance(row, dict):
                kind = _KINDS.get(type(row), "null")
                self.broken(f"{place}: must be an object with a key '{self.column}', and is {kind}")
            elif isinstance(text := row.get(self.column), str | None):
                if not seen:
                    names |= dict.fromkeys(row)
                    seen, waiting = self.column in row, waiting + 1
                    if not seen and waiting == _ROWS_WITHOUT_COLUMN:
                        self._check_column(list(names))
                yield number, None if text is None else _encoded(text)
            else:
                seen = True
                self.broken(f"{place}: data.column={self.column} must be text, and is {_KINDS[type(text)]}")
        if not seen and waiting:
            self._check_column(list(names))

    def csv(self, delimiter: str = ",") -> Rows:
        """Cells as they are: `NA`, `null` and `nan` are texts. A row's position is the line that it ends on."""
        csv.field_size_limit(sys.maxsize)
        with self._opened() as stream:
            lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(rows, None)
            if names is None:
                return
            self._check_column(names, ", line 1")
            index = names.index(self.column)
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    self.broken(f"data.path={self.file}, line {rows.line_num}: {error}")
                    continue
                if len(row) > len(names):
                    fields = f"{len(row)} fields, and the first line {len(names)}"
                    self.broken(f"data.path={self.file}, line {rows.line_num}: has {fields}")
                elif row and rows.line_num > self.start:
                    yield rows.line_num, _encoded(row[index]) if index < len(row) else None

    def tsv(self) -> Rows:
        return self.csv("\t")

    def text(self) -> Rows:
        self._check_column(["text"])
        if not self.start:
            with self._opened() as stream:
                yield 1, stream.read()

    def _check_column(self, names: list[str], place: str = "") -> None:
        check_column(self.column, names, f" in {self.file}{place}")

    def _opened(self) -> BinaryIO:
        return _OPENERS.get(self.file.suffix.lower(), open)(self.file, "rb")


def _parse(line: bytes) -> Any:
    """The value of the JSON text, or the ValueError that says what is wrong."""
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as error:
        return ValueError(f"{error.msg.removesuffix(' at')} at character {error.pos + 1}")
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("nested too deep")


def _encoded(text: str) -> bytes:
    """The bytes as they were in the file; half of a surrogate pair is invalid UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _open_zstd(file: Path, mode: str) -> BinaryIO:
    # Unlike the library zstandard, pyarrow notices that a file was cut short. Lines need a buffered reader.
    return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
