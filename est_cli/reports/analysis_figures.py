"""Figures of est-analyze: losses over training, their spread at the end, and the sharpness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from est_cli.reports import style
from est_cli.reports.comparison import Comparison
from est_cli.reports.curves import Axis, Curve, final_loss_window
from est_cli.reports.figures import draw_stages
from est_cli.reports.records import RunRecord

_MARKERS = ("o", "s", "D", "^", "v", "P")


def write_figures(runs: Sequence[dict[str, Any]], records: Sequence[RunRecord], out: Path) -> list[Path]:
    """PNG files of what est-analyze found in each run; `records` are the same runs."""
    with style.report_style():
        figures = {"transitions": _transitions(runs, records), "spread": _spread(runs), "sharpness": _sharpness(runs)}
        paths = {out / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
        for path, figure in paths.items():
            style.save_png(figure, path)
    return list(paths)


def _transitions(runs: Sequence[dict[str, Any]], records: Sequence[RunRecord]) -> Figure:
    """A panel a run: training loss, and at the checkpoints the full model and its subnetworks at equal weights."""
    figure = Figure(figsize=(style.WIDE, 4.0 * len(runs)))
    for ax, run, record in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs, records, strict=True):
        checkpoints, axis = run["checkpoints"], Axis.of("steps", [record])
        line = Curve.of(record, axis, "train/loss_smoothed")
        ax.plot(line.x, line.y, color=style.REST, linewidth=0.8, label="training loss, logged")
        at = np.array([entry["step"] + 1 for entry in checkpoints]) / axis.scale
        losses = [entry["full_loss"] for entry in checkpoints]
        look = {"color": style.SERIES[0], "marker": "o", "markersize": 5, "linewidth": 1.2}
        ax.plot(at, losses, label="full model, validation", **look)
        highest = losses
        for rank, spreads in enumerate(zip(*(entry["subnetworks"] for entry in checkpoints), strict=True), 1):
            mean = np.array([found["mean"] for found in spreads])
            low, high = ([found["quantiles"][level] for found in spreads] for level in ("0.05", "0.95"))
            highest = highest + high
            around = np.clip([mean - low, high - mean], 0, None)
            label = f"subnetworks, {rates_text(spreads[0]['rates'])} (mean, 5–95%)"
            look = {"color": style.series(rank), "marker": _MARKERS[rank % len(_MARKERS)], "markersize": 4.5}
            ax.errorbar(at, mean, around, label=label, linewidth=0.9, linestyle=(0, (3, 2)), capsize=2, **look)
        low, high = final_loss_window([line]) or ax.get_ylim()
        ax.set_ylim(min(low, 0.98 * min(losses)), max(high, 1.02 * max(highest)))
        ax.set_xlim(0, 1.02 * max([*at, *line.x[-1:]]))
        if len(record.stages) > 1:
            draw_stages(ax, Comparison([record]), axis)
        ax.set(xlabel=axis.label, ylabel="Loss (nats per token)")
        ax.set_title(run["name"] if len(runs) > 1 else "", loc="left", fontsize=9, color=style.INK)
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def rates_text(rates: dict[str, float]) -> str:
    """What is not kept whole: `heads 0.5, mlp 0.5`."""
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate != 1)


def _spread(runs: Sequence[dict[str, Any]]) -> Figure | None:
    """Every sampled subnetwork of the newest checkpoint: its loss less the full model's."""
    rows = [(run, found, rank) for run in runs for rank, found in enumerate(run["checkpoints"][-1]["subnetworks"], 1)]
    if not rows:
        return None
    figure = Figure(figsize=(style.WIDE, 1.0 + 0.42 * len(rows)))
    ax = figure.subplots()
    for y, (run, found, rank) in enumerate(rows):
        above = np.array(found["losses"]) - run["checkpoints"][-1]["full_loss"]
        style.draw_box(ax, above, y, style.series(rank))
        ax.plot(above, np.full(len(above), y), "|", color=style.INK, markersize=7, markeredgewidth=0.7, alpha=0.6)
    ax.axvline(0, color=style.SERIES[0], linewidth=1.2)
    names = [f"{run['name']}: " * (len(runs) > 1) + rates_text(found["rates"]) for run, found, _ in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("Loss of a subnetwork above the full model’s (nats per token)")
    ax.grid(axis="y", visible=False)
    return figure


def _sharpness(runs: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(style.WIDE, max(2.6, 1.2 + 0.4 * len(runs))))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    values = [run["sharpness"]["largest_eigenvalue"] for run in runs]
    for y, (run, value) in enumerate(zip(runs, values, strict=True)):
        left.barh(y, value, height=0.55, color=style.series(y))
        left.annotate(f"{value:.4g}", (max(value, 0), y), xytext=(4, 0), textcoords="offset points", va="center")
        columns = ([found[key] for found in run["perturbation"]] for key in ("relative_norm", "mean", "std"))
        look = {"marker": _MARKERS[y % len(_MARKERS)], "markersize": 5, "linewidth": 1.2, "capsize": 2.5}
        right.errorbar(*columns, color=style.series(y), label=run["name"], **look)
    left.set_yticks(range(len(runs)), [run["name"] for run in runs] if len(runs) > 1 else [""])
    left.set_ylim(len(runs) - 0.4, -0.6)
    left.set_xlim(min(0.0, *values), 1.25 * max(0.0, *values) or 1.0)
    left.set_xlabel("Largest eigenvalue of the Hessian")
    left.grid(axis="y", visible=False)
    right.set(xlabel="Noise, as a share of the weights’ norm", ylabel="Rise of the loss (nats), mean ± std")
    right.set_xlim(0, None)
    if len(runs) > 1:
        right.legend(frameon=False, loc="upper left")
    return figure
