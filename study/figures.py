"""The figures of docs/study.md, drawn in the reports' style, from the records alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from est_cli.commands.arms import ARMS, EST, FULL, FULL_SAME_FLOPS
from est_cli.reports import palette
from est_cli.reports.figures import report_style
from study.grid import LEARNING_RATES, Run, runs_with, schedules_of
from study.records import Records
from study.tables import ARM_WORDS, losses_by_rate, screened, short_frontier, tuned_runs

_ALL_LOOKS = list(zip(palette.SERIES, "os^DvPX", strict=False))
LOOKS = dict(zip((FULL, EST, FULL_SAME_FLOPS), _ALL_LOOKS, strict=False))
"""Colour and marker of an arm."""
_OTHER_LOOKS = _ALL_LOOKS[len(LOOKS) :]
_SIZE = (6.4, 3.6)
_NAMED = 5


def learning_rates(records: Records, ax: Axes) -> bool:
    """Final loss of every arm over the learning rate."""
    drawn = False
    for arm in ARMS:
        known = {float(lr): loss for lr, loss in losses_by_rate(records, arm).items() if loss is not None}
        _line(ax, LOOKS[arm], list(known), list(known.values()), ARM_WORDS[arm])
        drawn |= bool(known)
    ax.set_xscale("log", base=2)
    ax.set_xticks([float(lr) for lr in LEARNING_RATES], [f"{float(lr):g}" for lr in LEARNING_RATES])
    ax.minorticks_off()
    ax.set_xlabel("Peak learning rate")
    ax.set_ylabel("Validation loss after 10,000 steps")
    ax.legend(frameon=False)
    return drawn


def headline(records: Records, ax: Axes) -> bool:
    return _curves(records, ax, [(run, *_arm(run)) for run in runs_with(group="headline")])


def short_runs(records: Records, ax: Axes) -> bool:
    return _curves(records, ax, [(run, *_arm(run)) for run in tuned_runs()])


def candidates(records: Records, ax: Axes) -> bool:
    """The long runs: the full model, the paper's schedule, and what else got as long."""
    runs = [(run, *_arm(run)) for arm in (FULL, EST) for run in runs_with(group="headline", arm=arm)]
    tried = schedules_of("candidate")
    looks = dict(zip(dict.fromkeys(run.says for run in tried), _OTHER_LOOKS, strict=False))
    runs += [(run, run.says, looks[run.says]) for run in tried]
    return _curves(records, ax, runs)


def repeated(records: Records, ax: Axes) -> bool:
    """Loss on little text: the full model for fewer and more steps, the paper's schedule, and a longer one."""
    looks = {"full": LOOKS[FULL], "est": LOOKS[EST]}
    runs = [(run, run.says, looks.get(run.title, _OTHER_LOOKS[0])) for run in runs_with(group="repeated")]
    return _curves(records, ax, runs)


def screens(records: Records, ax: Axes) -> bool:
    """Every schedule's loss against its FLOPs, and the line of the full model trained for fewer steps.

    Named are the paper's schedule and the few that are furthest below the line, or least above it.
    """
    frontier, found = short_frontier(records), []
    for place, (_, run, record) in enumerate(screened(records)):
        name = "paper's schedule" if run.group == "lr" else run.title
        found.append((name if run.group == "lr" or place < _NAMED else "", record))
    _line(ax, LOOKS[FULL], frontier.flops / 1e12, frontier.loss, "full model, fewer steps")
    colour, marker = LOOKS[EST]
    for name, record in found:
        x, y = record.outcome["flops_total"] / 1e12, record.outcome["val_loss"]
        ax.plot([x], [y], color=colour, marker=marker, markersize=5, linestyle="")
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
    "headline": headline,
    "candidates": candidates,
    "short-runs": short_runs,
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


def _arm(run: Run) -> tuple[str, tuple[str, str]]:
    """Label and look of a run that is an arm's."""
    return ARM_WORDS[run.arm], LOOKS[run.arm]


def _curves(records: Records, ax: Axes, runs: list[tuple[Run, str, tuple[str, str]]]) -> bool:
    """Loss against whole-model FLOPs of those (run, label, look) that are done, the steep beginning left out."""
    late: list[float] = []
    for run, label, look in runs:
        for record in records.of([run]):
            done, y = record.column("step") + 1, record.column("val/loss")
            late += y[done >= 0.3 * done[-1]].tolist()
            _line(ax, look, record.column("flops/total") / 1e12, y, label)
    if late:
        room = 0.06 * (max(late) - min(late))
        ax.set_ylim(min(late) - room, max(late) + room)
        _legend(ax)
    ax.set_xlabel("Training compute, whole model (TFLOP)")
    ax.set_ylabel("Validation loss, full model")
    return bool(late)


def _line(
    ax: Axes, look: tuple[str, str], x: np.ndarray | list[float], y: np.ndarray | list[float], label: str
) -> None:
    colour, marker = look
    ax.plot(
        x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label.replace("`", "").replace("*", "")
    )


def _legend(ax: Axes) -> None:
    """Every label once: the seeds of a schedule share theirs."""
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    ax.legend(unique.values(), unique, frameon=False)
