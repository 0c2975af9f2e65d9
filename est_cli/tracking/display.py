"""A run in the terminal: a live panel, or plain lines in pipes, log files and dumb terminals."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live

from est_cli.config import TrainConfig
from est_cli.subnet.schedule import Stage
from est_cli.tracking.panel import Panel
from est_cli.tracking.summary import of_part
from est_cli.tracking.tracker import Record, RunInfo, Tracker
from est_cli.units import format_clock, format_count, format_loss, format_percent

_REFRESHES_PER_SECOND = 2
_PLAIN_LINE_EVERY_SHARE = 0.02
_PLAIN_LINE_EVERY_S = 10.0


class LastingFile:
    """A terminal, pipe or log file that may go away: `est-train | head`, a lost ssh session, a full disk.

    From then on, what is written is dropped and the run continues.
    """

    def __init__(self, file: TextIO):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> None:
        with self._lasting():
            self._file.write(text)

    def flush(self) -> None:
        with self._lasting():
            self._file.flush()

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What is buffered, and what others write there, must go somewhere too.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())


def console_for(format: str) -> Console:
    """Where people read: standard error if standard output belongs to one JSON object."""
    return Console(file=LastingFile(sys.stderr if format == "json" else sys.stdout))


class Display(Tracker):
    """The tracker for people. Each stage, evaluation and message leaves a line above the panel."""

    def __init__(self, console: Console, live: bool | None = None, label: str | None = None):
        """`label` begins every line if several runs share a terminal, which then has no panel."""
        self.console = console
        self._prefix = "" if label is None else f"{label}  "
        can_be_live = label is None and console.is_interactive and console.file.isatty()
        self._is_live = can_be_live if live is None else live
        self._live: Live | None = None

    def start(self, run: RunInfo) -> None:
        self._run = run
        self._panel = Panel(run)
        self._stage = run.stage_at(run.first_step)
        self._printed_step: int | None = None
        self._printed_at = 0.0
        self.say(self._describe(self._stage, "continuing at" if run.first_step else "from", run.first_step))
        if self._is_live:
            self._live = Live(self._panel, console=self.console, refresh_per_second=_REFRESHES_PER_SECOND)
            self._live.start()

    def log(self, record: Record) -> None:
        if record["stage"] != self._stage.number:
            self._stage = self._run.stages[record["stage"] - 1]
            self.say(self._describe(self._stage, "from", self._stage.first_step))
        self._panel.observe(record)
        if record["val/loss"] is not None or (self._live is None and self._is_due(record["step"])):
            self._printed_step, self._printed_at = record["step"], time.monotonic()
            self.say(self._line(record))

    def say(self, message: str) -> None:
        # Narrow windows must not break paths, and users' names are not markup.
        self.console.print(self._prefix + message, markup=False, highlight=False, soft_wrap=True)

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self.say("")

    def _is_due(self, step: int) -> bool:
        if self._printed_step is None or step == self._run.max_steps - 1:
            return True
        return (
            step - self._printed_step >= _PLAIN_LINE_EVERY_SHARE * self._run.max_steps
            and time.monotonic() - self._printed_at >= _PLAIN_LINE_EVERY_S
        )

    def _describe(self, stage: Stage, how: str, step: int) -> str:
        rates = ", ".join(_trained(self._run.config, stage)) or "the full model"
        share = self._run.flops_per_step[stage.number - 1] / self._run.full_flops_per_step
        cost = f" ({100 * share:.0f}% of full FLOPs)" if share < 1 else ""
        return f"stage {stage.number} of {len(self._run.stages)}, {how} step {step}: {rates}{cost}"

    def _line(self, record: Record) -> str:
        done, total = record["step"] + 1, self._run.max_steps
        parts = [f"{done:>{len(str(total))}}/{total}", f"loss {format_loss(record['train/loss'])}"]
        if self._live is None:
            parts[1:1] = [f"{100 * done // total:>3}%", f"stage {record['stage']}"]
            parts += [
                f"{format_count(record['perf/tokens_per_s'])} tokens/s",
                f"saved {format_percent(record['flops/saved'])}",
                f"left {format_clock(self._panel.seconds_left)}",
            ]
        if record["val/loss"] is not None:
            parts.append(f"validation {format_loss(record['val/loss'])}{of_part(record)}")
        return "  ".join(parts)


def _trained(config: TrainConfig, stage: Stage) -> Iterator[str]:
    """`the first 4 of 8 layers`, `0.5 of the heads`: what a stage trains of each dimension that is not whole."""
    sizes = stage.grown.sizes(config.model, config.sampling.mlp_block)
    for key, what, rate in (
        ("n_heads", "heads", stage.rates.heads),
        ("d_ff", "neurons", stage.rates.mlp),
        ("n_layers", "layers", stage.rates.layers),
    ):
        total = getattr(config.model, key)
        joined = f"the first {sizes[key]} of {total} {what}" if sizes[key] < total else ""
        if rate < 1:
            yield f"{rate:g} of {joined or f'the {what}'}"
        elif joined:
            yield joined
