"""Reads one local file of a dataset row by row: only its text column, and with the place of what is broken.

Text is handed on as the bytes that stand there, so that whoever decodes them replaces and counts invalid UTF-8.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from est_cli.data.dataset_files import DatasetFile
from est_cli.errors import UserError, nearest

Text = bytes | None
OnBroken = Callable[[str], None]
"""Takes what is broken, with file and line. What it does not raise for is left out."""

_ROWS_WITHOUT_COLUMN = 1000
"""Writers leave keys of empty values out. A file whose first rows all lack the column has none."""
_SHOWN_CHARACTERS = 40
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}


def read_rows(file: DatasetFile, column: str, on_broken: OnBroken, start: int = 0) -> Iterator[tuple[int, Text]]:
    """Position and text of each row behind position `start`; None for a row without text.

    Raises UserError where the file cannot be read.
    """
    try:
        yield from _ROWS_OF[file.reader](file.path, column, on_broken, start)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pyarrow and each decompressor raise errors of their own.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"data.path={file.path}: cannot be read as {file.reader} ({reason})") from None


def refuse_broken(reason: str) -> None:
    raise UserError(f"{reason}; data.on_broken=skip leaves broken rows out and counts them")


def check_column(name: str, names: list[str], place: str = "") -> None:
    if name not in names:
        # A file without a header has a document for a name.
        shown = [_short(own) for own in names]
        raise UserError(f"data.column={name}: must be one of {', '.join(shown)}{place}{nearest(name, shown)}")


def text_bytes(values: Any, name: str, place: str = "") -> Any:
    """A pyarrow column as large_binary. Raises UserError where it holds no text."""
    import pyarrow as pa

    kind = values.type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
        values = values.cast(kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        values = values.cast(kind)
    if pa.types.is_null(kind):
        return values.cast(pa.large_binary())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"data.column={name}: must be a column of text, and holds {kind}{place}")
    if pa.types.is_string_view(kind):
        values = values.cast(pa.binary_view())
    return values.cast(pa.large_binary())


def _parquet(file: Path, column: str, _: OnBroken, start: int) -> Iterator[tuple[int, Text]]:
    import pyarrow.parquet as pq

    with _opened(file) as stream:
        table = pq.ParquetFile(stream)
        check_column(column, table.schema_arrow.names, f" in {file}")
        row = 0
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if row + n_rows <= start:
                row += n_rows
                continue
            batches = table.iter_batches(1024, row_groups=[group], columns=[column])
            yield from (pair for pair in _batch_rows(batches, file, column, row) if pair[0] > start)
            row += n_rows


def _arrow(file: Path, column: str, _: OnBroken, start: int) -> Iterator[tuple[int, Text]]:
    import pyarrow as pa

    with _opened(file) as stream:
        try:
            table = pa.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        except pa.ArrowInvalid:
            stream.seek(0)
            table = batches = pa.ipc.open_stream(stream)
        check_column(column, table.schema.names, f" in {file}")
        yield from ((row, text) for row, text in _batch_rows(batches, file, column, 0) if row > start)


def _batch_rows(batches: Any, file: Path, column: str, row: int) -> Iterator[tuple[int, Text]]:
    for batch in batches:
        values = batch.column(batch.schema.get_field_index(column))
        for text in text_bytes(values, column, f" in {file}").to_pylist():
            row += 1
            yield row, text


def _json_lines(file: Path, column: str, on_broken: OnBroken, start: int) -> Iterator[tuple[int, Text]]:
    with _opened(file) as stream:
        yield from _objects(_parsed_lines(stream, start), file, "line", column, on_broken, start)


def _json(file: Path, column: str, on_broken: OnBroken, start: int) -> Iterator[tuple[int, Text]]:
    """Lines of JSON, a list of objects, one object, or one that holds the column as a list."""
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
        yield from _json_lines(file, column, on_broken, start)
        return
    entries = ((i, entry) for i, entry in enumerate(whole, 1) if i > start)
    yield from _objects(entries, file, "entry", column, on_broken, start)


def _objects(
    rows: Iterator[tuple[int, Any]], file: Path, unit: str, column: str, on_broken: OnBroken, start: int
) -> Iterator[tuple[int, Text]]:
    names: dict[str, None] = {}
    seen, waiting = start > 0, 0
    for number, row in rows:
        place = f"data.path={file}, {unit} {number}"
        if isinstance(row, ValueError):
            on_broken(f"{place}: is no JSON ({row})")
        elif not isinstance(row, dict):
            on_broken(f"{place}: must be an object with a key '{column}', and is {_KINDS.get(type(row), 'null')}")
        elif isinstance(text := row.get(column), str | None):
            if not seen:
                names |= dict.fromkeys(row)
                seen, waiting = column in row, waiting + 1
                if not seen and waiting == _ROWS_WITHOUT_COLUMN:
                    check_column(column, list(names), f" in {file}")
            yield number, None if text is None else _encoded(text)
        else:
            seen = True
            on_broken(f"{place}: data.column={column} must be text, and is {_KINDS[type(text)]}")
    if not seen and waiting:
        check_column(column, list(names), f" in {file}")


def _parsed_lines(stream: BinaryIO, start: int) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        if number > start and line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    """What the JSON holds, or the ValueError that says what is wrong."""
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as error:
        return ValueError(f"{error.msg.removesuffix(' at')} at character {error.pos + 1}")
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("nested too deep")


def _encoded(text: str) -> bytes:
    """As it stood in the file; half of a surrogate pair is invalid UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _csv(file: Path, column: str, on_broken: OnBroken, start: int, delimiter: str = ",") -> Iterator[tuple[int, Text]]:
    """Cells as they stand: `NA`, `null` and `nan` are texts. The position of a row is the line that it ends on."""
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
                on_broken(f"data.path={file}, line {rows.line_num}: {error}")
                continue
            if len(row) > len(names):
                on_broken(
                    f"data.path={file}, line {rows.line_num}: has {len(row)} fields, and the first line {len(names)}"
                )
            elif row and rows.line_num > start:
                yield rows.line_num, _encoded(row[index]) if index < len(row) else None


def _tsv(file: Path, column: str, on_broken: OnBroken, start: int) -> Iterator[tuple[int, Text]]:
    return _csv(file, column, on_broken, start, "\t")


def _text(file: Path, column: str, _: OnBroken, start: int) -> Iterator[tuple[int, Text]]:
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


def _opened(file: Path) -> BinaryIO:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".bz2":
        return bz2.open(file)
    if suffix == ".xz":
        return lzma.open(file)
    if suffix == ".zst":
        import zstandard

        # A file may hold several frames, and a reader of rows asks for lines.
        reader = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True)
        return io.BufferedReader(reader)
    return file.open("rb")


def _short(name: str) -> str:
    return name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…"
