"""The figures of docs/study.md, drawn in the reports' style, from the records alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from est_cli.commands.arms import ARMS, EST, FULL, FULL_SAME_FLOPS
from est_cli.reports import palette
from est_cli.reports.figures import report_style
from study.grid import LEARNING_RATES, TUNED, grid
from study.records import Records
from study.tables import ARM_WORDS, screened, short_frontier

COLOURS = dict(zip((FULL, EST, FULL_SAME_FLOPS), palette.SERIES, strict=False))
MARKERS = {FULL: "o", EST: "s", FULL_SAME_FLOPS: "^"}
_SIZE = (6.4, 3.6)
_NAMED = 5


def learning_rates(records: Records, ax: Axes) -> bool:
    """Final loss of every arm over the learning rate."""
    drawn = False
    for arm in ARMS:
        names = {float(lr): f"lr-{arm}-{lr}" for lr in LEARNING_RATES}
        known = {
            lr: records.contents[name]["summary"]["val_loss"] for lr, name in names.items() if name in records.contents
        }
        _line(ax, arm, list(known), list(known.values()))
        drawn |= bool(known)
    ax.set_xscale("log", base=2)
    ax.set_xticks([float(lr) for lr in LEARNING_RATES], [f"{float(lr):g}" for lr in LEARNING_RATES])
    ax.minorticks_off()
    ax.set_xlabel("Peak learning rate")
    ax.set_ylabel("Validation loss after 10,000 steps")
    ax.legend(frameon=False)
    return drawn


def curves(records: Records, ax: Axes, group: str) -> bool:
    """Loss against whole-model FLOPs, the steep beginning left out; one line a run."""
    wanted = [run for run in grid() if run.group == group]
    if group == "lr":
        wanted = [run for run in wanted if run.name in {f"lr-{arm}-{TUNED[arm]}" for arm in ARMS}]
    runs, labelled, late = records.of(wanted), set(), []
    for run in runs:
        arm, done = run.setting("name"), run.column("step") + 1
        x, y = run.column("flops/total") / 1e12, run.column("val/loss")
        late += y[done >= 0.3 * done[-1]].tolist()
        _line(ax, arm, x, y, label=None if arm in labelled else ARM_WORDS[arm])
        labelled.add(arm)
    _finish_curves(ax, late)
    return bool(runs)


def repeated(records: Records, ax: Axes) -> bool:
    """Loss against whole-model FLOPs on little text: the full model, the paper's schedule, and what else was tried."""
    runs, labelled = [run for run in grid() if run.group == "repeated" and run in records], set()
    late = []
    for run, record in zip(runs, records.of(runs), strict=True):
        arm = FULL if run.title.startswith("full") else EST if run.title == "est" else FULL_SAME_FLOPS
        label = {FULL: "full model", EST: "EST, the paper's schedule"}.get(arm, run.says)
        x, y = record.column("flops/total") / 1e12, record.column("val/loss")
        late += y[len(y) // 3 :].tolist()
        _line(ax, arm, x, y, label=None if label in labelled else label)
        labelled.add(label)
    _finish_curves(ax, late)
    return bool(runs)


def _finish_curves(ax: Axes, late: list[float]) -> None:
    """Axes for curves of which the `late` losses are to be seen."""
    if late:
        room = 0.06 * (max(late) - min(late))
        ax.set_ylim(min(late) - room, max(late) + room)
        ax.legend(frameon=False)
    ax.set_xlabel("Training compute, whole model (TFLOP)")
    ax.set_ylabel("Validation loss, full model")


def screens(records: Records, ax: Axes) -> bool:
    """Every schedule's loss against its FLOPs, and the line of the full model trained for fewer steps.

    Named are the paper's schedule and the few that are furthest below the line, or least above it.
    """
    frontier, found = short_frontier(records), []
    for place, (_, run, record) in enumerate(screened(records)):
        name = "paper's schedule" if run.group == "lr" else run.title
        found.append((name if run.group == "lr" or place < _NAMED else "", record))
    _line(ax, FULL, frontier.flops / 1e12, frontier.loss, label="full model, fewer steps")
    for name, record in found:
        x, y = record.outcome["flops_total"] / 1e12, record.outcome["val_loss"]
        ax.plot([x], [y], color=COLOURS[EST], marker=MARKERS[EST], markersize=5, linestyle="")
        if name:
            ax.annotate(
                name, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7.5, color=palette.INK
            )  # fmt: skip
    ax.set_xlabel("Training compute, whole model (TFLOP)")
    ax.set_ylabel("Validation loss at the end")
    ax.legend(frameon=False)
    return bool(found)


FIGURES: dict[str, Callable[[Records, Axes], bool]] = {
    "learning-rates": learning_rates,
    "headline": lambda records, ax: curves(records, ax, "headline"),
    "short-runs": lambda records, ax: curves(records, ax, "lr"),
    "screens": screens,
    "repeated": repeated,
}
"""By file name; each returns whether there was anything to draw."""


def draw(records: Records, folder: Path) -> list[Path]:
    """Write the figures that have something to show; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with report_style():
        for name, drawing in FIGURES.items():
            figure = Figure(figsize=_SIZE)
            path = folder / f"{name}.svg"
            if drawing(records, figure.subplots()):
                # Without a date, so that the same records give the same bytes.
                figure.savefig(path, facecolor="white", metadata={"Date": None})
                written.append(path)
            else:
                path.unlink(missing_ok=True)
    return written


def _line(ax: Axes, arm: str, x: np.ndarray | list[float], y: np.ndarray | list[float], label: str | None = "") -> None:
    ax.plot(
        x, y, color=COLOURS[arm], marker=MARKERS[arm], markersize=4, linewidth=1.4,
        label=ARM_WORDS[arm] if label == "" else label,
    )  # fmt: skip
