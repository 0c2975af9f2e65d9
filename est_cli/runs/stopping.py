"""Signals that ask a run to stop: the step in progress ends, a checkpoint is written, the exit code is 75."""

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from est_cli.errors import RunFailed

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
)
"""What schedulers and people send. SIGHUP is a terminal that closes; under nohup it stays ignored."""


def quit_until_training_begins() -> None:
    """Until there is something to keep, a signal ends the process at once, and says so."""

    def quit(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise RunFailed(f"{name} came before training began; nothing is lost, and the same command starts again")

    _handle(quit, [number for number in STOP_SIGNALS if number != signal.SIGINT])


def _handle(handler: Callable[[int, FrameType | None], None], numbers: Sequence[int] = STOP_SIGNALS) -> None:
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, handler)


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Restores the handler of every signal at the end of the block."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and handler != signal.getsignal(number):
                signal.signal(number, handler)


class StopRequest:
    """Handles the stop signals. Calling it returns whether one has come; a second SIGINT quits at once.

    A rank also stops when the process that started it is gone, because nothing could stop it any more.
    """

    def __init__(self) -> None:
        self.requested = False
        self._starter = os.getppid() if "WORLD_SIZE" in os.environ else None
        _handle(self._receive)

    def __call__(self) -> bool:
        return self.requested or (self._starter is not None and os.getppid() != self._starter)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@functools.cache
def stop_request() -> StopRequest:
    """The only one of this process, so a signal that comes between two jobs of a sweep stops the next."""
    return StopRequest()
