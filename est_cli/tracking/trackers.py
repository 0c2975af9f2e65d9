"""The trackers that a configuration asks for, and those that copy metrics.jsonl into another tool's format."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from est_cli.config import TrainConfig
from est_cli.config.sections import LOGGERS
from est_cli.plugins import named_function, require_package
from est_cli.tracking.display import Display, console_for
from est_cli.tracking.metrics import METRICS_NAME, MetricsFile, finite, iterate_metrics
from est_cli.tracking.tracker import Record, RunInfo, Tracker
from est_cli.tracking.wandb_tracker import WandbTracker

CSV_NAME = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"
_TENSORBOARD_FLUSH_S = 5


def trackers_for(config: TrainConfig, label: str | None = None) -> list[Tracker]:
    """In calling order: metrics.jsonl first, because others read it; the display last, because it shows what they say.

    `label` marks this run's lines if several runs print to one terminal.
    Raises UserError if a library that the configuration needs is not installed.
    """
    display = Display(console_for(config.format), label=label)
    trackers: list[Tracker] = [MetricsFile(display.say)]
    match config.logger.kind:
        case "wandb" if config.logger.mode != "disabled":
            trackers.append(WandbTracker(display.say))
        case "tensorboard":
            trackers.append(TensorBoardTracker(display.say))
        case "csv":
            trackers.append(CsvTracker(display.say))
        case own if own not in LOGGERS:
            trackers.append(named_function(own, {}, "logger.kind")())
    return [*trackers, display]


class FileTracker(Tracker):
    """A copy of metrics.jsonl in another format. Start it after `MetricsFile`.

    A resumed run writes the copy again from metrics.jsonl, so no step is missing or there twice. Subclasses have
    `_open(run_dir)`, which begins an empty file, `_write(record)`, whose numbers are finite or None, and `_close()`.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._works = True

    def start(self, run: RunInfo) -> None:
        self._try(self._open, run.run_dir)
        for record in iterate_metrics(run.run_dir / METRICS_NAME):
            self._try(self._write, record)

    def log(self, record: Record) -> None:
        self._try(self._write, finite(record))

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        self._try(self._close)

    def _try(self, do: Callable[..., None], *arguments: Any) -> None:
        """A full disk ends this copy, not the training."""
        if self._works:
            try:
                do(*arguments)
            except OSError as error:
                self._works = False
                self._say(f"{type(self).__name__} gives up ({error}); training goes on, {METRICS_NAME} has every step")


class CsvTracker(FileTracker):
    """logger=csv: metrics.csv for spreadsheets and pandas. An empty cell is a null of metrics.jsonl."""

    def _open(self, run_dir: Path) -> None:
        self._file = (run_dir / CSV_NAME).open("w", newline="", buffering=1)
        self._rows: csv.DictWriter | None = None

    def _write(self, record: Record) -> None:
        if self._rows is None:
            self._rows = csv.DictWriter(self._file, list(record), lineterminator="\n")
            self._rows.writeheader()
        self._rows.writerow(record)

    def _close(self) -> None:
        self._file.close()


class TensorBoardTracker(FileTracker):
    """logger=tensorboard: an event file with one scalar, a 32-bit float, for each key of metrics.jsonl.

    Raises UserError if tensorboard is not installed.
    """

    def __init__(self, say: Callable[[str], None]):
        super().__init__(say)
        require_package("tensorboard", "logger=tensorboard", "est-cli[tensorboard]", "logger=csv")

    def _open(self, run_dir: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run_dir / TENSORBOARD_FOLDER
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = EventFileWriter(str(folder), flush_secs=_TENSORBOARD_FLUSH_S)

    def _write(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = {key: value for key, value in record.items() if key != "step" and value is not None}
        values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._events.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def _close(self) -> None:
        self._events.close()
