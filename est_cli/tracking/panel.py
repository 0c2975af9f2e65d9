"""The live picture of a run: the loss curve over a bar of stages, and the numbers below."""

import math
import time
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from est_cli.subnet.schedule import Stage, stage_at
from est_cli.tracking.pace import Pace
from est_cli.tracking.summary import of_part
from est_cli.tracking.tracker import Record, RunInfo
from est_cli.units import (
    format_clock,
    format_count,
    format_flops,
    format_loss,
    format_percent,
    format_step_time,
)

_STAGE_COLOURS = ("cyan", "magenta", "green", "blue", "yellow")
_TWO_COLUMNS_FROM = 72
_CURVE_POINTS = 240


class Panel:
    """A rich renderable; what `observe` was told last is what it shows."""

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
        width = options.max_width
        ascii_only = options.ascii_only
        done = self._record["step"] + 1
        yield Group(
            "",
            self._curve.draw(width, " .:-=+*#" if ascii_only else " ▁▂▃▄▅▆▇█"),
            stage_bar(self._run.stages, done, width, "=-" if ascii_only else "━─"),
            stage_labels(self._run, width),
            self._numbers(two_columns=width >= _TWO_COLUMNS_FROM),
        )

    def _numbers(self, two_columns: bool) -> Table:
        cells = self._cells()
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(2 if two_columns else 1):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(no_wrap=True, overflow="ellipsis", ratio=1 if two_columns else None)
        table.expand = two_columns
        rows = zip(cells[::2], cells[1::2], strict=True) if two_columns else ((cell,) for cell in cells)
        for row in rows:
            table.add_row(*(part for cell in row for part in cell))
        return table

    def _cells(self) -> list[tuple[str, str]]:
        record, run = self._record, self._run
        done = record["step"] + 1
        validation = self._validation
        validation_text = (
            "-"
            if validation is None
            else f"{format_loss(validation['val/loss'])}{of_part(validation)} after {validation['step'] + 1} steps"
        )
        speed = (
            f"{format_count(record.get('perf/tokens_per_s'))} tokens/s, "
            f"{format_step_time(record.get('perf/step_s'))}/step"
        )
        if record.get("perf/mfu") is not None:
            speed += f", MFU {format_percent(record['perf/mfu'])}"
        lr = record.get("train/lr")
        return [
            ("step", f"{done} of {run.max_steps} ({format_percent(done / run.max_steps)})"),
            ("stage", f"{record['stage']} of {len(run.stages)}"),
            ("loss", format_loss(record.get("train/loss"))),
            ("validation", validation_text),
            ("speed", speed),
            ("lr", "-" if lr is None else f"{lr:.2e}"),
            ("FLOPs saved", saved_flops(record)),
            ("on blocks", format_percent(record.get("flops/saved_blocks"))),
            ("elapsed", format_clock(time.monotonic() - self._started)),
            ("left", format_clock(self.seconds_left)),
        ]


def saved_flops(record: dict[str, Any]) -> str:
    """`24.1% (1.23 PFLOP)`: of the whole model, up to this record."""
    if record.get("flops/total") is None:
        return "-"
    flops = record["flops/full_total"] - record["flops/total"]
    return f"{format_percent(record['flops/saved'])} ({format_flops(flops)})"


class Curve:
    """The loss over the whole run, drawn two characters high: it grows to the right with the bar below it."""

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
        """The mean loss in each of `width` columns. Points that no logged step fell into show the one before."""
        means: list[float | None] = []
        last = max((point for point, count in enumerate(self._counts) if count), default=-1)
        for start, end in pairwise(i * self._points // width for i in range(width + 1)):
            points = slice(start, max(end, start + 1))
            count = sum(self._counts[points])
            gap = means[-1] if means and start <= last else None
            means.append(sum(self._sums[points]) / count if count else gap)
        return means


def stage_bar(stages: tuple[Stage, ...], done: int, width: int, glyphs: str) -> Text:
    """A bar of `width` characters, coloured by stage; `glyphs` for steps that are done and that are not."""
    bar = Text(no_wrap=True)
    total = stages[-1].end
    for column in range(width):
        step = (column + 0.5) * total / width
        colour = _colour(stage_at(stages, step))
        finished = step < done
        bar.append(glyphs[0 if finished else 1], colour if finished else f"dim {colour}")
    return bar


def stage_labels(run: RunInfo, width: int) -> Text:
    """Below each stage of the bar its number and, where there is room for all, its cost next to the full model's."""
    costs = [f"{100 * flops / run.full_flops_per_step:.0f}%" for flops in run.flops_per_step]
    ends = [round(stage.end * width / run.max_steps) for stage in run.stages]
    rooms = [end - start for start, end in pairwise([0, *ends])]
    forms = ("stage {0}: {1} of full FLOPs", "stage {0}: {1}", "stage {0}", "{0}")
    for form in forms:
        texts = [form.format(stage.number, cost) for stage, cost in zip(run.stages, costs, strict=True)]
        if all(len(text) < room for text, room in zip(texts, rooms, strict=True)):
            break
    labels = Text(no_wrap=True)
    for stage, text, room in zip(run.stages, texts, rooms, strict=True):
        labels.append((text if len(text) < room else "").ljust(room), _colour(stage))
    return labels


def _colour(stage: Stage) -> str:
    return _STAGE_COLOURS[(stage.number - 1) % len(_STAGE_COLOURS)]
