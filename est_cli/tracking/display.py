"""A run in the terminal: a live panel, or plain lines in pipes, log files and dumb terminals."""

import contextlib
import math
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median
from typing import Any, TextIO

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from est_cli.config import TrainConfig
from est_cli.subnet.schedule import Stage
from est_cli.tracking.summary import joined_part
from est_cli.tracking.tracker import Record, RunInfo, Tracker
from est_cli.units import format_clock, format_count, format_flops, format_loss, format_percent, format_step_time

_REFRESHES_PER_SECOND = 2
_PLAIN_LINE_EVERY_SHARE = 0.02
_PLAIN_LINE_EVERY_S = 10.0
_STAGE_COLOURS = ("cyan", "magenta", "green", "blue", "yellow")
_TWO_COLUMNS_FROM = 72
_CURVE_POINTS = 240
_STEPS_REMEMBERED = 21
_STEPS_BEFORE_A_GUESS = 3


class LastingFile:
    """A terminal, pipe or log file that may go away: `est-train | head`, a lost ssh session, a full disk.

    From then on, what is written is dropped and the run continues.
    """

    def __init__(self, file: TextIO):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> None:
        self._try(self._file.write, text)

    def flush(self) -> None:
        self._try(self._file.flush)

    def _try(self, do: Callable[..., Any], *arguments: str) -> None:
        try:
            do(*arguments)
        except OSError:
            # What is buffered, and what others write to the descriptor, goes to /dev/null.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())


def console_for(format: str) -> Console:
    """Where people read: standard error if standard output belongs to one JSON object."""
    return Console(file=LastingFile(sys.stderr if format == "json" else sys.stdout))


class Display(Tracker):
    """The tracker for people. Each stage, evaluation and message leaves a line above the panel."""

    def __init__(self, console: Console, label: str | None = None):
        """`label` begins every line if several runs share a terminal, which then has no panel."""
        self.console = console
        self._prefix = "" if label is None else f"{label}  "
        self._can_be_live = label is None and console.is_interactive and console.file.isatty()
        self._live: Live | None = None

    def start(self, run: RunInfo) -> None:
        self._run = run
        self._panel = Panel(run)
        self._stage = run.stage_at(run.first_step)
        self._printed_step = self._printed_at = -math.inf
        self.say(self._describe(self._stage, "continuing at" if run.first_step else "from", run.first_step))
        if self._can_be_live:
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
        steps, seconds = step - self._printed_step, time.monotonic() - self._printed_at
        last = step == self._run.max_steps - 1
        return last or (steps >= _PLAIN_LINE_EVERY_SHARE * self._run.max_steps and seconds >= _PLAIN_LINE_EVERY_S)

    def _describe(self, stage: Stage, how: str, step: int) -> str:
        rates = ", ".join(_trained(self._run.config, stage)) or "the full model"
        saved = self._run.ledger.stage_saved(stage.number)
        cost = f" ({100 * (1 - saved):.0f}% of full FLOPs)" if saved > 0 else ""
        return f"stage {stage.number} of {len(self._run.stages)}, {how} step {step}: {rates}{cost}"

    def _line(self, record: Record) -> str:
        done, total = record["step"] + 1, self._run.max_steps
        parts = [f"{done:>{len(str(total))}}/{total}", f"loss {format_loss(record['train/loss'])}"]
        if self._live is None:
            parts[1:1] = [f"{100 * done // total:>3}%", f"stage {record['stage']}"]
            parts += [
                f"{format_count(record['perf/tokens_per_s'])} tokens/s",
                f"saved {format_percent(record['flops/saved'])}",
                f"left {format_clock(self._panel.pace.seconds_left(time.monotonic()))}",
            ]
        if record["val/loss"] is not None:
            parts.append(f"validation {format_loss(record['val/loss'])}{joined_part(record)}")
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


class Panel:
    """A rich renderable of the record it observed last: the loss curve over a bar of stages, and the numbers."""

    def __init__(self, run: RunInfo):
        self.pace = Pace(run)
        self._run = run
        self._started = time.monotonic()
        self._record: Record = {"step": run.first_step - 1, "stage": run.stage_at(run.first_step).number}
        self._validation: Record | None = None
        self._curve = Curve(run.max_steps)

    def observe(self, record: Record) -> None:
        self._record = record
        self.pace.observe(record, time.monotonic())
        if record["val/loss"] is not None:
            self._validation = record
        if record["train/loss"] is not None and math.isfinite(record["train/loss"]):
            self._curve.add(record["step"], record["train/loss"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, ascii_only = options.max_width, options.ascii_only
        yield ""
        yield self._curve.draw(width, " .:-=+*#" if ascii_only else " ▁▂▃▄▅▆▇█")
        yield _stage_rows(self._run, self._record["step"] + 1, width, "=-" if ascii_only else "━─")
        # An ellipsis marks a number that is cut, but ASCII has none.
        overflow, cells = "crop" if ascii_only else "ellipsis", self._cells()
        n_columns = 2 if width >= _TWO_COLUMNS_FROM else 1
        table = Table.grid(padding=(0, 2, 0, 0), expand=n_columns == 2)
        for _ in range(n_columns):
            table.add_column(style="dim", no_wrap=True, overflow=overflow)
            table.add_column(no_wrap=True, overflow=overflow, ratio=n_columns - 1 or None)
        for first in range(0, len(cells), n_columns):
            table.add_row(*(part for cell in cells[first : first + n_columns] for part in cell))
        yield table

    def _cells(self) -> list[tuple[str, str]]:
        known, run = self._record.get, self._run
        done, now = self._record["step"] + 1, time.monotonic()
        validated = saved = "-"
        if (found := self._validation) is not None:
            validated = f"{format_loss(found['val/loss'])}{joined_part(found)} after {found['step'] + 1} steps"
        if known("flops/total") is not None:
            flops = format_flops(known("flops/full_total") - known("flops/total"))
            saved = f"{format_percent(known('flops/saved'))} ({flops})"
        speed = f"{format_count(known('perf/tokens_per_s'))} tokens/s, {format_step_time(known('perf/step_s'))}/step"
        if known("perf/mfu") is not None:
            speed += f", MFU {format_percent(known('perf/mfu'))}"
        return [
            ("step", f"{done} of {run.max_steps} ({format_percent(done / run.max_steps)})"),
            ("stage", f"{self._record['stage']} of {len(run.stages)}"),
            ("loss", format_loss(known("train/loss"))),
            ("validation", validated),
            ("speed", speed),
            ("lr", "-" if known("train/lr") is None else f"{known('train/lr'):.2e}"),
            ("FLOPs saved", saved),
            ("on blocks", format_percent(known("flops/saved_blocks"))),
            ("elapsed", format_clock(now - self._started)),
            ("left", format_clock(self.pace.seconds_left(now))),
        ]


class Pace:
    """How fast each stage runs, and the time that is left.

    Later stages train larger subnetworks: a stage that has not been measured yet is expected to take the time of
    the latest one, times the ratio of their FLOPs.
    """

    def __init__(self, run: RunInfo):
        self._run = run
        self._step_s: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_STEPS_REMEMBERED))
        self._last: tuple[int, float] | None = None
        self._training_s = self._other_s = 0.0

    def observe(self, record: Record, now: float) -> None:
        """`now` in seconds of any clock.

        Time between records that is not in their steps went into evaluations and checkpoints. The same share is
        expected for the rest of the run.
        """
        step, step_s = record["step"], record["perf/step_s"]
        if step_s is None:
            return
        self._step_s[record["stage"]].append(step_s)
        if self._last is not None:
            steps_s = (step - self._last[0]) * step_s
            self._training_s += steps_s
            self._other_s += max(0.0, now - self._last[1] - steps_s)
        self._last = step, now

    def step_s(self, stage: int) -> float:
        """Seconds of one step of a stage (from 1), measured or expected."""
        measured = stage if stage in self._step_s else max(self._step_s)
        flops = self._run.ledger.per_step
        return median(self._step_s[measured]) * (flops[stage - 1].total / flops[measured - 1].total)

    def seconds_left(self, now: float) -> float | None:
        """From `now` to the end of the training; None until a few steps have been measured."""
        if self._last is None or sum(map(len, self._step_s.values())) < _STEPS_BEFORE_A_GUESS:
            return None
        next_step, then = self._last[0] + 1, self._last[1]
        steps_s = sum(
            (stage.end - max(stage.first_step, next_step)) * self.step_s(stage.number)
            for stage in self._run.stages
            if stage.end > next_step
        )
        overhead = self._other_s / self._training_s if self._training_s else 0.0
        return max(0.0, steps_s * (1 + overhead) - (now - then))


class Curve:
    """The loss over the whole run, two characters high, which grows to the right with the bar below it."""

    def __init__(self, max_steps: int):
        self._max_steps = max_steps
        points = min(max_steps, _CURVE_POINTS)
        self._sums, self._counts = np.zeros(points), np.zeros(points)

    def add(self, step: int, loss: float) -> None:
        point = step * len(self._sums) // self._max_steps
        self._sums[point] += loss
        self._counts[point] += 1

    def draw(self, width: int, levels: str) -> Text:
        """`levels` are characters of growing height; the first is the empty one.

        A column without a logged step shows the mean loss of the column before it.
        """
        logged = np.flatnonzero(self._counts)
        if not len(logged):
            return Text("\n")
        starts = np.arange(width) * len(self._sums) // width
        starts = starts[starts <= logged[-1]]
        sums, counts = (np.add.reduceat(values, starts) for values in (self._sums, self._counts))
        shown = np.maximum.accumulate(np.where(counts > 0, np.arange(len(starts)), -1))
        means = sums[shown] / counts[shown]
        low, high, top = means.min(), means.max(), len(levels) - 1
        scale = (2 * top - 1) / (high - low) if high > low else 0.0
        heights = np.where(shown < 0, 0, 1 + ((means - low) * scale).round()).astype(int)
        rows = ("".join(levels[height] for height in np.clip(heights - base, 0, top)) for base in (top, 0))
        return Text("\n".join(rows), no_wrap=True)


def _stage_rows(run: RunInfo, done: int, width: int, glyphs: str) -> Text:
    """A bar of `width` characters, coloured by stage, over each stage's number and its cost next to the full model's.

    `glyphs` mark steps that are done and steps that are not. Costs are shown if all of them fit.
    """
    costs = [f"{100 * (1 - run.ledger.stage_saved(stage.number)):.0f}%" for stage in run.stages]
    edges = [0, *(round(stage.end * width / run.max_steps) for stage in run.stages)]
    rooms = [end - start for start, end in pairwise(edges)]
    for form in ("stage {0}: {1} of full FLOPs", "stage {0}: {1}", "stage {0}", "{0}"):
        texts = [form.format(stage.number, cost) for stage, cost in zip(run.stages, costs, strict=True)]
        if all(len(text) < room for text, room in zip(texts, rooms, strict=True)):
            break
    bar, labels = Text(no_wrap=True), Text(no_wrap=True)
    filled = round(done * width / run.max_steps)
    for number, (start, room, text) in enumerate(zip(edges[:-1], rooms, texts, strict=True)):
        colour, finished = _STAGE_COLOURS[number % len(_STAGE_COLOURS)], min(max(filled - start, 0), room)
        bar.append(glyphs[0] * finished, colour).append(glyphs[1] * (room - finished), f"dim {colour}")
        labels.append((text if len(text) < room else "").ljust(room), colour)
    return bar.append("\n").append(labels)
