"""metrics.jsonl, the record of a run: one JSON object a line, every logged step once, in order."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from orjson import loads  # reads a million lines in 2 s; json takes 10 s

from est_cli.tracking.tracker import Record, RunInfo, Tracker

METRICS_NAME = "metrics.jsonl"


class MetricsFile(Tracker):
    """Writes metrics.jsonl. A resumed run continues the same file.

    While the disk is full, lines wait in memory and training goes on; `say` tells people once.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._file: IO[bytes] | None = None
        self._waiting = b""
        self._complained = False

    def start(self, run: RunInfo) -> None:
        path = run.run_dir / METRICS_NAME
        truncate(path, run.first_step)
        self._file = path.open("ab", buffering=0)

    def log(self, record: Record) -> None:
        self._waiting += to_line(record)
        try:
            self._write_waiting()
        except OSError as error:
            if not self._complained:
                self._say(f"{self._file.name} cannot be written ({error.strerror}): its lines wait in memory")
            self._complained = True

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Raises OSError if lines are still waiting and the disk does not take them."""
        if self._file is None:
            return
        try:
            self._write_waiting()
        except OSError:
            if status != "failed":
                raise
        finally:
            self._file.close()
            self._file = None

    def _write_waiting(self) -> None:
        lines, before = self._waiting, os.fstat(self._file.fileno()).st_size
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
        except OSError:
            os.ftruncate(self._file.fileno(), before)  # a full disk may have taken half a line
            raise
        self._waiting = b""


def to_line(record: Record) -> bytes:
    """One line of JSON."""
    return json.dumps(finite(record), allow_nan=False).encode() + b"\n"


def finite(record: Record) -> Record:
    """The record with None for NaN and infinity, which JSON does not have."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in record.items()}


def truncate(path: Path, before_step: int) -> None:
    """Cuts the file at the first line that is damaged or belongs to `before_step` or later.

    Lines are in the order of their steps, so this is one system call: a kill leaves the old file or the new one,
    and a full disk does no harm. Does nothing if there is no file.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = 0
        for line in file:
            step = _step_of(line)
            if step is None or step >= before_step:
                break
            end += len(line)
        file.truncate(end)


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, one at a time, without a last line that was cut short.

    Raises ValueError naming any other damaged line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    yield loads(line)
                except ValueError:
                    raise ValueError(f"{path}, line {number}: is not JSON") from None


def _step_of(line: bytes) -> int | None:
    """The step of a complete line, or None."""
    try:
        return loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
