"""A tracker that writes metrics.jsonl once more, in the format of another tool."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from est_cli.tracking.metrics import METRICS_NAME, finite, iterate_metrics
from est_cli.tracking.tracker import Record, RunInfo


class FileTracker:
    """Where a run continues, what it wrote before is made again from metrics.jsonl: no step is lost, or there twice.

    `say` gets the messages for people. Must be started after `MetricsFile`.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._works = True

    def _open(self, run_dir: Path) -> None:
        """Begin an empty file."""
        raise NotImplementedError

    def _write(self, record: Record) -> None:
        """Add a record, whose numbers are finite or None."""
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def start(self, run: RunInfo) -> None:
        self._try(self._open, run.run_dir)
        for record in iterate_metrics(run.run_dir / METRICS_NAME):
            self._try(self._write, record)

    def log(self, record: Record) -> None:
        self._try(self._write, finite(record))

    def say(self, message: str) -> None:
        pass

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        self._try(self._close)

    def _try(self, do: Callable[..., None], *arguments: Any) -> None:
        """A full disk ends this record, not the training."""
        if not self._works:
            return
        try:
            do(*arguments)
        except OSError as error:
            self._works = False
            self._say(f"{type(self).__name__} gives up ({error}); training goes on, {METRICS_NAME} has every step")
