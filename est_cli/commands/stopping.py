"""Signals that ask a run to stop: the step in progress ends, a checkpoint is written, the exit code is 75."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Called, it tells whether one of the signals has come. SIGINT twice quits at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        return self.requested

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
