"""logger=tensorboard: an event file that `tensorboard --logdir outputs` shows, a scalar a key of metrics.jsonl.

TensorBoard keeps scalars as 32-bit floats.
"""

import time
from collections.abc import Callable
from pathlib import Path

from est_cli.plugins import require_package
from est_cli.tracking.file_tracker import FileTracker
from est_cli.tracking.tracker import Record

FOLDER = "tensorboard"
_FLUSH_S = 5


class TensorBoardTracker(FileTracker):
    """Raises UserError where tensorboard is not installed."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__(say)
        require_package("tensorboard", "logger=tensorboard", "est-cli[tensorboard]", "logger=csv")

    def _open(self, run_dir: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run_dir / FOLDER
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = EventFileWriter(str(folder), flush_secs=_FLUSH_S)

    def _write(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=key, simple_value=value)
            for key, value in record.items()
            if key != "step" and value is not None
        ]
        self._events.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def _close(self) -> None:
        self._events.close()
