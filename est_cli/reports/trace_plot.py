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


def read_step(path: Path) -> tuple[list[Bar], list[Bar]]:
    """Phases and work in the step of median length. Raises ValueError for a trace without steps.

    The work is the GPU's kernels, or on a CPU the innermost operations.
    """
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

    return bars(annotations), bars(by_category["kernel"]) or bars(_innermost(by_category["cpu_op"]))


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


def draw(steps: dict[str, tuple[list[Bar], list[Bar]]]) -> Figure:
    """Phases and work of one step for each stage."""
    figure = Figure(figsize=(style.WIDE, 0.7 + 0.95 * len(steps)))
    axes = figure.subplots(len(steps), sharex=True, squeeze=False)[:, 0]
    for ax, (stage, (phases, work)) in zip(axes, steps.items(), strict=True):
        _draw_step(ax, phases, work)
        ax.set_title(stage.replace("-", " "), loc="left", fontsize="medium")
    axes[-1].set_xlabel("ms from the start of the step")
    handles = [Patch(color=style.SERIES[i], label=kind) for i, kind in enumerate(KINDS)]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(KINDS), frameon=False)
    return figure


def _draw_step(ax: Axes, phases: list[Bar], work: list[Bar]) -> None:
    longest = max((bar.start + bar.length for bar in phases), default=0)
    for name, start, length in phases:
        ax.broken_barh([(start, length)], (1.1, 0.8), color=style.GRID, edgecolor=style.MUTED, lw=0.4)
        if length > 0.08 * longest:
            ax.text(start + length / 2, 1.5, f"{name} {length:.0f}", ha="center", va="center")
    for number, kind in enumerate(KINDS):
        spans = [(start, length) for name, start, length in work if kind_of(name) == kind]
        ax.broken_barh(spans, (0.1, 0.8), color=style.SERIES[number], lw=0)
    ax.set(yticks=[0.5, 1.5], yticklabels=["work", "phases"], ylim=(0, 2))
    ax.grid(axis="y", visible=False)


def main() -> None:
    parser = argparse.ArgumentParser("python -m est_cli.reports.trace_plot", description=__doc__)
    parser.add_argument("folder", type=Path, help="of *.trace.json")
    parser.add_argument("out", type=Path, help="a PNG, SVG or PDF")
    arguments = parser.parse_args()
    paths = sorted(arguments.folder.glob("*.trace.json"))
    if not paths:
        parser.error(f"{arguments.folder}: holds no *.trace.json")
    try:
        steps = {path.name.split(".")[0]: read_step(path) for path in paths}
    except (ValueError, KeyError, TypeError, OSError) as error:
        parser.error(f"{arguments.folder}: a trace cannot be read: {error}")
    with style.report_style():
        draw(steps).savefig(arguments.out, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
