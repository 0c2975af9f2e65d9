"""metrics.jsonl, the record of a run: one JSON object a line, every logged step once, in order."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from est_cli.tracking.tracker import Record, RunInfo

try:
    from orjson import loads  # a million lines in 2 s rather than in 10 s
except ImportError:
    from json import loads

METRIC_KEYS = (
    "step",
    "tokens",
    "stage",
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "val/loss",
    "subnet/heads",
    "subnet/mlp",
    "subnet/layers",
    "flops/step",
    "flops/total",
    "flops/full_total",
    "flops/saved",
    "flops/saved_blocks",
    "perf/step_s",
    "perf/tokens_per_s",
    "perf/mfu",
)

METRICS_NAME = "metrics.jsonl"


class MetricsFile:
    """The tracker that writes metrics.jsonl. A resumed run goes on in the same file.

    While the disk is full, lines wait in memory and training goes on; `say` tells people once.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._file: IO[bytes] | None = None
        self._waiting: list[bytes] = []
        self._complained = False

    def start(self, run: RunInfo) -> None:
        path = run.run_dir / METRICS_NAME
        truncate(path, run.first_step)
        self._file = path.open("ab", buffering=0)

    def log(self, record: Record) -> None:
        self._waiting.append(to_line(record))
        try:
            self._write_waiting()
        except OSError as error:
            if not self._complained:
                self._say(f"{self._file.name} cannot be written ({error.strerror}): its lines wait in memory")
            self._complained = True

    def say(self, message: str) -> None:
        pass

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Raises OSError where lines are still waiting and the disk does not take them."""
        if self._file is None:
            return
        try:
            if self._waiting:
                self._write_waiting()
        except OSError:
            if status != "failed":
                raise
        finally:
            self._file.close()
            self._file = None

    def _write_waiting(self) -> None:
        lines = b"".join(self._waiting)
        before = os.fstat(self._file.fileno()).st_size
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
        except OSError:
            os.ftruncate(self._file.fileno(), before)  # a full disk may have taken half a line
            raise
        self._waiting.clear()


def to_line(record: Record) -> bytes:
    """One line of JSON."""
    return json.dumps(finite(record), allow_nan=False).encode() + b"\n"


def finite(record: Record) -> Record:
    """The record with null for numbers that are not finite, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def truncate(path: Path, before_step: int) -> None:
    """Cuts everything from the first line that is damaged or of `before_step` or later. No file is no error.

    Lines are in the order of their steps, so that this is one system call: a kill leaves the old file or the
    new one, and a full disk does not get in the way.
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
    """The records of a metrics.jsonl, one at a time; a last line that was cut short is left out.

    Raises ValueError naming the line that is damaged otherwise.
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
