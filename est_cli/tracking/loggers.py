"""What `logger=` chooses: copies of metrics.jsonl in another tool's format, and W&B."""

import csv
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from est_cli.config import TrainConfig, as_plain
from est_cli.config.sections import LOGGERS
from est_cli.plugins import named_function, require_package
from est_cli.tracking.display import Display, console_for
from est_cli.tracking.metrics import METRICS_NAME, MetricsFile, finite, iterate_metrics
from est_cli.tracking.tracker import Record, RunInfo, Tracker

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
        self._file = (run_dir / "metrics.csv").open("w", newline="", buffering=1)
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

        folder = run_dir / "tensorboard"
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


class WandbTracker(Tracker):
    """logger=wandb: starts `wandb_process` and tells it how the run ended. Start it after `MetricsFile`.

    Raises UserError if wandb is not installed.
    """

    def __init__(self, say: Callable[[str], None], finish_timeout_s: float = 30.0):
        require_package("wandb", "logger=wandb", "wandb", "logger=none")
        self._say = say
        self._finish_timeout_s = finish_timeout_s
        self._listener: threading.Thread | None = None

    def start(self, run: RunInfo) -> None:
        # The training's import path, but no wandb service of another process.
        environment = {"WANDB_ERROR_REPORTING": "false", **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("WANDB_SERVICE", None)
        try:
            job = self._job(run)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "est_cli.tracking.wandb_process"],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._send(job)
        except OSError as error:
            self._say(f"W&B could not start ({error}); training goes on, {METRICS_NAME} has every step")
            return
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Waits a bounded time until wandb has taken what is left."""
        if self._listener is None:
            return
        try:
            self._send({"status": status, "summary": summary})
            self._process.stdin.close()
            self._process.wait(self._finish_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._say(f"W&B did not finish within {self._finish_timeout_s:.0f} s and was left behind")
        except OSError:
            self._process.wait()  # it ended earlier, and the listener has said so
        self._listener.join(timeout=1.0)
        self._listener = None

    def _job(self, run: RunInfo) -> dict[str, Any]:
        """What the process needs to know, as JSON. Stages are a mapping, so W&B can filter on each of their rates."""
        folder = run.run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        config = as_plain(run.config)
        config["scheduler"]["stages"] = {str(i): stage for i, stage in enumerate(config["scheduler"]["stages"], 1)}
        return {
            "metrics": str(run.run_dir / METRICS_NAME),
            "init": {
                **{key: config["logger"][key] for key in ("mode", "project", "entity", "group", "tags")},
                "name": f"{run.config.name}-{run.run_dir.name}",
                "id": _saved_run_id(folder / "run_id.txt"),
                "dir": str(run.run_dir),
                "notes": run.command,
                "config": config,
            },
            "finish_timeout_s": self._finish_timeout_s * 0.8,
            "patience_s": self._finish_timeout_s * 1.2,
            "system_metrics": run.config.trainer.device == "cuda",
        }

    def _send(self, message: dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _listen(self) -> None:
        process = self._process
        for line in process.stdout:
            self._say(line.rstrip("\n"))
        if process.wait() != 0 and not process.stdin.closed:  # closed: `finish` tells what happens
            self._say(
                f"W&B's process ended (exit code {process.returncode}); training goes on, {METRICS_NAME} has every step"
            )


def _saved_run_id(path: Path) -> str:
    """The W&B run id of this run directory, created on first use and kept for resumed runs."""
    if not path.exists() or not path.read_text().strip():
        path.write_text(secrets.token_hex(8) + "\n")
    return path.read_text().strip()
