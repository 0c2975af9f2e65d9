"""How far tokenizing is, and how fast it goes."""

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from est_cli.data import Say

_LINE_EVERY_S = 60


class TokenizingProgress:
    """A bar on standard error (bytes of text, MB/s, time left), or a line a minute where there is no terminal."""

    def __init__(self, total_bytes: int, done_bytes: int, show: bool, say: Say):
        self._total = total_bytes
        self._done = self._found = done_bytes
        self._say = None if show else say
        self._start = self._last_line = time.perf_counter()
        self._bar = Progress(
            TextColumn("tokenizing"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total_bytes, completed=done_bytes)

    def __enter__(self) -> "TokenizingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        self._bar.update(self._task, advance=n_bytes)
        if self._say is not None and time.perf_counter() > self._last_line + _LINE_EVERY_S:
            self._last_line = time.perf_counter()
            minutes = (self._total - self._done) / self.bytes_per_s / 60
            self._say(
                f"data: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB tokenized, "
                f"{self.bytes_per_s / 1e6:.1f} MB/s, about {minutes:.0f} minutes left"
            )

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def bytes_per_s(self) -> float:
        """Of what was tokenized here, without what was found done."""
        return (self._done - self._found) / max(self.seconds, 1e-9)
