"""python -m est_cli.reports.trace_plot RUN/profile out.png: one step of every stage's trace, on one scale of time."""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


class Bar(NamedTuple):
    """Something that took time, in ms from the start of the step."""

    name: str
    start: float
    length: float


class Step(NamedTuple):
    """One optimizer step of a trace."""

    stage: str
    phases: list[Bar]
    work: list[Bar]
    """The GPU's kernels, or on a CPU the innermost operations."""


def read_step(path: Path) -> Step:
    """The step of median length in a trace. Raises ValueError for a file without steps."""
    by_category = defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("ph") == "X":
            by_category[event.get("cat")].append(event)
    annotations = by_category["user_annotation"]
    steps = sorted((e for e in annotations if e["name"].startswith("ProfilerStep")), key=lambda event: event["dur"])
    if not steps:
        raise ValueError(f"{path}: holds no step")
    step = steps[(len(steps) - 1) // 2]
    begin, end = step["ts"], step["ts"] + step["dur"]

    def bars(events: Iterable[dict[str, Any]]) -> list[Bar]:
        inside = (event for event in events if begin <= event["ts"] < end and event is not step)
        return [Bar(event["name"], (event["ts"] - begin) / 1e3, event["dur"] / 1e3) for event in inside]

    work = bars(by_category["kernel"]) or bars(_innermost(by_category["cpu_op"]))
    return Step(path.name.split(".")[0], bars(annotations), work)


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


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if pattern.search(name))


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
    longest = max((bar.start + bar.length for bar in step.phases), default=0)
    for name, start, length in step.phases:
        axis.broken_barh([(start, length)], (1.1, 0.8), color=style.GRID, edgecolor=style.MUTED, lw=0.4)
        if length > 0.08 * longest:
            axis.text(start + length / 2, 1.5, f"{name} {length:.0f}", ha="center", va="center")
    for number, kind in enumerate(KINDS):
        spans = [(start, length) for name, start, length in step.work if kind_of(name) == kind]
        axis.broken_barh(spans, (0.1, 0.8), color=style.SERIES[number], lw=0)
    axis.set(yticks=[0.5, 1.5], yticklabels=["work", "phases"], ylim=(0, 2))
    axis.grid(axis="y", visible=False)
    axis.set_title(step.stage.replace("-", " "), loc="left", fontsize="medium")


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
