"""python -m est_cli.reports.trace_plot RUN/profile out.png: one step of every stage's trace, on one scale of time."""

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from est_cli.reports import style

OTHER = "everything else"
KINDS = {
    "matrix products": re.compile(r"aten::(add)?b?mm(_|$)|gemm|cutlass|nvjet"),
    "attention": re.compile(r"attention|flash|fmha"),
    OTHER: re.compile(""),
}
"""Kinds of operations and kernels; the first pattern that matches the name decides."""


@dataclass(frozen=True)
class Bar:
    """Something that took time, in ms from the start of the step."""

    name: str
    start: float
    length: float


@dataclass(frozen=True)
class Step:
    """One optimizer step of a trace."""

    stage: str
    phases: list[Bar]
    work: list[Bar]
    """The GPU's kernels, or on a CPU the innermost operations."""


def read_step(path: Path) -> Step:
    """The step of median length in a trace. Raises ValueError for a file without steps."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    steps = sorted(_of(events, "user_annotation", r"ProfilerStep"), key=lambda event: event["dur"])
    if not steps:
        raise ValueError(f"{path}: holds no step")
    step = steps[statistics.median_low(range(len(steps)))]
    begin, end = step["ts"], step["ts"] + step["dur"]
    inside = [e for e in events if begin <= e["ts"] < end]
    work = _of(inside, "kernel") or list(_innermost(_of(inside, "cpu_op")))
    phases = [event for event in _of(inside, "user_annotation") if event is not step]
    return Step(path.name.split(".")[0], *(_bars(found, begin) for found in (phases, work)))


def draw(steps: list[Step]) -> Figure:
    figure = Figure(figsize=(9.2, 0.7 + 0.95 * len(steps)))
    axes = figure.subplots(len(steps), sharex=True, squeeze=False)[:, 0]
    for axis, step in zip(axes, steps, strict=True):
        _draw_step(axis, step)
    axes[-1].set_xlabel("ms from the start of the step")
    handles = [Patch(color=style.SERIES[i], label=kind) for i, kind in enumerate(KINDS)]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(KINDS), frameon=False)
    return figure


def _draw_step(axis: Axes, step: Step) -> None:
    for bar in step.phases:
        axis.broken_barh([(bar.start, bar.length)], (1.1, 0.8), color=style.GRID, edgecolor=style.MUTED, lw=0.4)
    longest = max((bar.start + bar.length for bar in step.phases), default=0)
    for bar in step.phases:
        if bar.length > 0.08 * longest:
            axis.text(bar.start + bar.length / 2, 1.5, f"{bar.name} {bar.length:.0f}", ha="center", va="center")
    for number, kind in enumerate(KINDS):
        spans = [(bar.start, bar.length) for bar in step.work if kind_of(bar.name) == kind]
        axis.broken_barh(spans, (0.1, 0.8), color=style.SERIES[number], lw=0)
    axis.set_yticks([0.5, 1.5], ["work", "phases"])
    axis.set_ylim(0, 2)
    axis.grid(axis="y", visible=False)
    axis.set_title(step.stage.replace("-", " "), loc="left", fontsize="medium")


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if pattern.search(name))


def _of(events: Iterable[dict[str, Any]], category: str, name: str = "") -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") == category and re.match(name, event["name"])]


def _innermost(operations: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Operations with no other inside them on the same thread. A matrix product or attention hides what is inside."""
    ordered = sorted(operations, key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    until: dict[int, float] = {}
    for event, following in zip(ordered, [*ordered[1:], None], strict=True):
        thread, end = event["tid"], event["ts"] + event["dur"]
        if event["ts"] < until.get(thread, 0):
            continue
        if kind_of(event["name"]) != OTHER:
            until[thread] = end
        elif following and following["tid"] == thread and following["ts"] < end:
            continue
        yield event


def _bars(events: Iterable[dict[str, Any]], begin: float) -> list[Bar]:
    return [Bar(event["name"], (event["ts"] - begin) / 1e3, event["dur"] / 1e3) for event in events]


def main() -> None:
    parser = argparse.ArgumentParser("python -m est_cli.reports.trace_plot", description=__doc__)
    parser.add_argument("folder", type=Path, help="of *.trace.json")
    parser.add_argument("out", type=Path, help="a PNG, SVG or PDF")
    arguments = parser.parse_args()
    paths = sorted(arguments.folder.glob("*.trace.json"))
    if not paths:
        parser.error(f"{arguments.folder}: holds no *.trace.json")
    try:
        steps = [read_step(path) for path in paths]
    except (ValueError, KeyError, TypeError, OSError) as error:
        parser.error(f"{arguments.folder}: a trace cannot be read: {error}")
    with style.report_style():
        draw(steps).savefig(arguments.out, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
