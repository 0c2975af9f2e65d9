"""Signals that ask a run to stop: the step in progress ends, a checkpoint is written, the exit code is 75."""

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Called, it tells whether one of the signals has come. SIGINT twice quits at once.

    A process of several also stops when the one that started it is gone, as nobody could stop it any more.
    """

    def __init__(self) -> None:
        self.requested = False
        self._starter = os.getppid() if "WORLD_SIZE" in os.environ else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        return self.requested or (self._starter is not None and os.getppid() != self._starter)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
