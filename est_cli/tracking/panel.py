"""The live panel of a run: the loss curve over a bar of stages, the numbers below, and the time that is left."""

import math
import time
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from est_cli.subnet.schedule import Stage, stage_at
from est_cli.tracking.summary import of_part
from est_cli.tracking.tracker import Record, RunInfo
from est_cli.units import format_clock, format_count, format_flops, format_loss, format_percent, format_step_time

_STAGE_COLOURS = ("cyan", "magenta", "green", "blue", "yellow")
_TWO_COLUMNS_FROM = 72
_CURVE_POINTS = 240
_STEPS_REMEMBERED = 21
_STEPS_BEFORE_A_GUESS = 3


class Panel:
    """A rich renderable that shows the record it observed last."""

    def __init__(self, run: RunInfo):
        self._run = run
        self._pace = Pace(run)
        self._started = time.monotonic()
        self._record: Record = {"step": run.first_step - 1, "stage": run.stage_at(run.first_step).number}
        self._validation: Record | None = None
        self._curve = Curve(run.max_steps)

    def observe(self, record: Record) -> None:
        self._record = record
        self._pace.observe(record, time.monotonic())
        if record["val/loss"] is not None:
            self._validation = record
        if record["train/loss"] is not None and math.isfinite(record["train/loss"]):
            self._curve.add(record["step"], record["train/loss"])

    @property
    def seconds_left(self) -> float | None:
        return self._pace.seconds_left(time.monotonic())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, ascii_only = options.max_width, options.ascii_only
        yield Group(
            "",
            self._curve.draw(width, " .:-=+*#" if ascii_only else " ▁▂▃▄▅▆▇█"),
            _stage_bar(self._run.stages, self._record["step"] + 1, width, "=-" if ascii_only else "━─"),
            _stage_labels(self._run, width),
            self._numbers(width >= _TWO_COLUMNS_FROM, "crop" if ascii_only else "ellipsis"),
        )

    def _numbers(self, two_columns: bool, overflow: Literal["crop", "ellipsis"]) -> Table:
        cells = self._cells()
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(2 if two_columns else 1):
            table.add_column(style="dim", no_wrap=True, overflow=overflow)
            table.add_column(no_wrap=True, overflow=overflow, ratio=1 if two_columns else None)
        table.expand = two_columns
        for row in zip(cells[::2], cells[1::2], strict=True) if two_columns else zip(cells, strict=True):
            table.add_row(*(part for cell in row for part in cell))
        return table

    def _cells(self) -> list[tuple[str, str]]:
        known, run, validation = self._record.get, self._run, self._validation
        done = self._record["step"] + 1
        validated, saved = "-", "-"
        if validation is not None:
            loss = f"{format_loss(validation['val/loss'])}{of_part(validation)}"
            validated = f"{loss} after {validation['step'] + 1} steps"
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
            ("elapsed", format_clock(time.monotonic() - self._started)),
            ("left", format_clock(self.seconds_left)),
        ]


class Pace:
    """How fast each stage runs, and the time that is left.

    Later stages train larger subnetworks: a stage that has not been measured yet is expected to take the time of
    the latest one, times the ratio of their FLOPs.
    """

    def __init__(self, run: RunInfo):
        self._run = run
        self._step_s: dict[int, deque[float]] = {}
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
        self._step_s.setdefault(record["stage"], deque(maxlen=_STEPS_REMEMBERED)).append(step_s)
        if self._last is not None:
            steps_s = (step - self._last[0]) * step_s
            self._training_s += steps_s
            self._other_s += max(0.0, now - self._last[1] - steps_s)
        self._last = step, now

    def step_s(self, stage: int) -> float | None:
        """Seconds of one step of a stage (from 1), measured or expected; None before anything is known."""
        if not self._step_s:
            return None
        measured = stage if stage in self._step_s else max(self._step_s)
        flops = self._run.flops_per_step
        return median(self._step_s[measured]) * (flops[stage - 1] / flops[measured - 1])

    def seconds_left(self, now: float) -> float | None:
        """From `now` to the end of the training; None until a few steps have been measured."""
        if self._last is None or sum(map(len, self._step_s.values())) < _STEPS_BEFORE_A_GUESS:
            return None
        next_step = self._last[0] + 1
        if next_step >= self._run.max_steps:
            return 0.0
        steps_s = sum(
            (stage.end - max(stage.first_step, next_step)) * self.step_s(stage.number)
            for stage in self._run.stages
            if stage.end > next_step
        )
        overhead = self._other_s / self._training_s if self._training_s else 0.0
        return max(0.0, steps_s * (1 + overhead) - (now - self._last[1]))


class Curve:
    """The loss over the whole run, two characters high, which grows to the right with the bar below it."""

    def __init__(self, max_steps: int):
        self._max_steps = max_steps
        self._points = min(max_steps, _CURVE_POINTS)
        self._sums = [0.0] * self._points
        self._counts = [0] * self._points

    def add(self, step: int, loss: float) -> None:
        point = step * self._points // self._max_steps
        self._sums[point] += loss
        self._counts[point] += 1

    def draw(self, width: int, levels: str) -> Text:
        """`levels` are characters of growing height; the first is the empty one."""
        means = self._means(width)
        known = [mean for mean in means if mean is not None]
        if not known:
            return Text("\n")
        low, high = min(known), max(known)
        top = len(levels) - 1
        scale = (2 * top - 1) / (high - low) if high > low else 0.0
        heights = [0 if mean is None else 1 + round((mean - low) * scale) for mean in means]
        rows = ("".join(levels[min(max(height - base, 0), top)] for height in heights) for base in (top, 0))
        return Text("\n".join(rows), no_wrap=True)

    def _means(self, width: int) -> list[float | None]:
        """The mean loss in each of `width` columns. A point without a logged step shows the one before it."""
        means: list[float | None] = []
        last = max((point for point, count in enumerate(self._counts) if count), default=-1)
        for start, end in pairwise(i * self._points // width for i in range(width + 1)):
            points = slice(start, max(end, start + 1))
            count = sum(self._counts[points])
            gap = means[-1] if means and start <= last else None
            means.append(sum(self._sums[points]) / count if count else gap)
        return means


def _stage_bar(stages: tuple[Stage, ...], done: int, width: int, glyphs: str) -> Text:
    """A bar of `width` characters, coloured by stage; `glyphs` mark steps that are done and steps that are not."""
    bar = Text(no_wrap=True)
    for column in range(width):
        step = (column + 0.5) * stages[-1].end / width
        colour, finished = _colour(stage_at(stages, step)), step < done
        bar.append(glyphs[0 if finished else 1], colour if finished else f"dim {colour}")
    return bar


def _stage_labels(run: RunInfo, width: int) -> Text:
    """Each stage's number below its part of the bar, with its cost next to the full model's if all of them fit."""
    costs = [f"{100 * flops / run.full_flops_per_step:.0f}%" for flops in run.flops_per_step]
    ends = [round(stage.end * width / run.max_steps) for stage in run.stages]
    rooms = [end - start for start, end in pairwise([0, *ends])]
    for form in ("stage {0}: {1} of full FLOPs", "stage {0}: {1}", "stage {0}", "{0}"):
        texts = [form.format(stage.number, cost) for stage, cost in zip(run.stages, costs, strict=True)]
        if all(len(text) < room for text, room in zip(texts, rooms, strict=True)):
            break
    labels = Text(no_wrap=True)
    for stage, text, room in zip(run.stages, texts, rooms, strict=True):
        labels.append((text if len(text) < room else "").ljust(room), _colour(stage))
    return labels


def _colour(stage: Stage) -> str:
    return _STAGE_COLOURS[(stage.number - 1) % len(_STAGE_COLOURS)]
