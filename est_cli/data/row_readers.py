"""Reads one local file of a dataset row by row: only its text column. Errors name the file and the line.

Yields the bytes of the file itself, so that whoever decodes them can replace and count invalid UTF-8.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from est_cli.data import Say
from est_cli.data.dataset_files import DatasetFile
from est_cli.errors import UserError, nearest

Rows = Iterator[tuple[int, bytes | None]]
"""Position and text of each row; None for a row without text."""

_ROWS_WITHOUT_COLUMN = 1000
"""Writers omit the keys of empty values. A file whose first rows all lack the column does not have it."""
_SHOWN_CHARACTERS = 40
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}


class Broken:
    """Called with what is broken in a row. Raises UserError, or with data.on_broken=skip counts the row.

    With `say` it also tells the first skipped row.
    """

    def __init__(self, on_broken: str, say: Say | None = None):
        self._skips, self._say = on_broken == "skip", say
        self.count, self.first = 0, ""

    def __call__(self, reason: str) -> None:
        if not self._skips:
            raise UserError(f"{reason}; data.on_broken=skip leaves broken rows out and counts them")
        if not self.count:
            self.first = reason
            if self._say is not None:
                self._say(f"data: left out a broken row, {reason}; further ones are left out silently")
        self.count += 1


def read_rows(file: DatasetFile, column: str, broken: Broken, start: int = 0) -> Rows:
    """The rows after position `start`.

    Raises UserError if the file cannot be read.
    """
    try:
        yield from _ROWS_OF[file.reader](file.path, column, broken, start)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pyarrow and each decompressor have their own exceptions.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"data.path={file.path}: cannot be read as {file.reader} ({reason})") from None


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


def _parquet(file: Path, column: str, _: Broken, start: int) -> Rows:
    with _opened(file) as stream:
        table = pq.ParquetFile(stream)
        check_column(column, table.schema_arrow.names, f" in {file}")
        row = 0
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if row + n_rows > start:
                batches = table.iter_batches(1024, row_groups=[group], columns=[column])
                yield from _batch_rows(batches, file, column, row, start)
            row += n_rows


def _arrow(file: Path, column: str, _: Broken, start: int) -> Rows:
    with _opened(file) as stream:
        try:
            table = pa.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        except pa.ArrowInvalid:
            stream.seek(0)
            table = batches = pa.ipc.open_stream(stream)
        check_column(column, table.schema.names, f" in {file}")
        yield from _batch_rows(batches, file, column, 0, start)


def _batch_rows(batches: Iterable[pa.RecordBatch], file: Path, column: str, row: int, start: int) -> Rows:
    for batch in batches:
        values = batch.column(batch.schema.get_field_index(column))
        for text in text_bytes(values, column, f" in {file}").to_pylist():
            row += 1
            if row > start:
                yield row, text


def _json_lines(file: Path, column: str, broken: Broken, start: int) -> Rows:
    with _opened(file) as stream:
        lines = ((n, _parse(line)) for n, line in enumerate(stream, 1) if n > start and line.strip())
        yield from _objects(lines, file, "line", column, broken, start)


def _json(file: Path, column: str, broken: Broken, start: int) -> Rows:
    """Lines of JSON, a list of objects, one object, or an object that holds the column as a list."""
    with _opened(file) as stream:
        filled = (line for line in stream if line.strip())
        first, second = next(filled, b""), next(filled, None)
    whole = None
    if second is None or not isinstance(_parse(first), dict):
        with _opened(file) as stream:
            whole = _parse(stream.read())
    if isinstance(whole, dict):
        texts = whole.get(column)
        whole = [{column: text} for text in texts] if isinstance(texts, list) else [whole]
    if not isinstance(whole, list):
        yield from _json_lines(file, column, broken, start)
        return
    entries = ((i, entry) for i, entry in enumerate(whole, 1) if i > start)
    yield from _objects(entries, file, "entry", column, broken, start)


def _objects(rows: Iterable[tuple[int, Any]], file: Path, unit: str, column: str, broken: Broken, start: int) -> Rows:
    names: dict[str, None] = {}
    seen, waiting = start > 0, 0
    for number, row in rows:
        place = f"data.path={file}, {unit} {number}"
        if isinstance(row, ValueError):
            broken(f"{place}: is no JSON ({row})")
        elif not isinstance(row, dict):
            broken(f"{place}: must be an object with a key '{column}', and is {_KINDS.get(type(row), 'null')}")
        elif isinstance(text := row.get(column), str | None):
            if not seen:
                names |= dict.fromkeys(row)
                seen, waiting = column in row, waiting + 1
                if not seen and waiting == _ROWS_WITHOUT_COLUMN:
                    check_column(column, list(names), f" in {file}")
            yield number, None if text is None else _encoded(text)
        else:
            seen = True
            broken(f"{place}: data.column={column} must be text, and is {_KINDS[type(text)]}")
    if not seen and waiting:
        check_column(column, list(names), f" in {file}")


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


def _csv(file: Path, column: str, broken: Broken, start: int, delimiter: str = ",") -> Rows:
    """Cells as they are: `NA`, `null` and `nan` are texts. A row's position is the line that it ends on."""
    csv.field_size_limit(sys.maxsize)
    with _opened(file) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(rows, None)
        if names is None:
            return
        check_column(column, names, f" in {file}, line 1")
        index = names.index(column)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                broken(f"data.path={file}, line {rows.line_num}: {error}")
                continue
            if len(row) > len(names):
                broken(
                    f"data.path={file}, line {rows.line_num}: has {len(row)} fields, and the first line {len(names)}"
                )
            elif row and rows.line_num > start:
                yield rows.line_num, _encoded(row[index]) if index < len(row) else None


def _tsv(file: Path, column: str, broken: Broken, start: int) -> Rows:
    return _csv(file, column, broken, start, "\t")


def _text(file: Path, column: str, _: Broken, start: int) -> Rows:
    check_column(column, ["text"], f" in {file}")
    if not start:
        with _opened(file) as stream:
            yield 1, stream.read()


_ROWS_OF = {
    "parquet": _parquet,
    "arrow": _arrow,
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "text": _text,
}


def _zstd(file: Path) -> BinaryIO:
    # Files can hold several frames, and only a buffered reader can be read by lines.
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True))


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def _opened(file: Path) -> BinaryIO:
    return _OPENERS.get(file.suffix.lower(), lambda path: path.open("rb"))(file)
