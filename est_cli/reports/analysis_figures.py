"""Figures of est-analyze: losses over training, their spread at the end, and the sharpness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from est_cli.reports import palette
from est_cli.reports.arms import Comparison
from est_cli.reports.axes import AXES
from est_cli.reports.curves import final_loss_window, train_curve
from est_cli.reports.figures import laid_out, report_style, save_png
from est_cli.reports.records import RunRecord
from est_cli.reports.stage_bands import draw_stages

_WIDTH = 9.2
_MARKERS = ("o", "s", "D", "^", "v", "P")


def write_figures(runs: Sequence[dict[str, Any]], records: Sequence[RunRecord], out: Path) -> list[Path]:
    """PNG files of what est-analyze found of each run; `records` are the same runs."""
    paths = []
    with report_style():
        for name, figure in (
            ("transitions", _transitions(runs, records)),
            ("spread", _spread(runs)),
            ("sharpness", _sharpness(runs)),
        ):
            if figure is not None:
                paths.append(out / f"{name}.png")
                save_png(laid_out(figure), paths[-1])
    return paths


def _transitions(runs: Sequence[dict[str, Any]], records: Sequence[RunRecord]) -> Figure:
    """A panel a run: training loss, and at the checkpoints the full model and its subnetworks at equal weights."""
    figure = Figure(figsize=(_WIDTH, 4.0 * len(runs)))
    for ax, run, record in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs, records, strict=True):
        line = train_curve(record, AXES[0])
        ax.plot(line.x, line.y, color=palette.REST, linewidth=0.8, label="training loss, logged")
        at = [entry["step"] + 1 for entry in run["checkpoints"]]
        losses = [entry["full_loss"] for entry in run["checkpoints"]]
        ax.plot(
            at, losses, color=palette.SERIES[0], marker="o", markersize=5, linewidth=1.2, label="full model, validation"
        )
        for rank, found in enumerate(run["checkpoints"][0]["subnetworks"], 1):
            _draw_subnetworks(ax, run, at, rank, _kept(found["rates"]))
        low, high = final_loss_window([line]) or ax.get_ylim()
        ax.set_ylim(
            min(low, 0.98 * min(losses)), max(high, 1.02 * max(_highest(entry) for entry in run["checkpoints"]))
        )
        ax.set_xlim(0, max(1.0, *at, *line.x[-1:]) * 1.02)
        if len(record.stages) > 1:
            draw_stages(ax, Comparison.of([record]), AXES[0], 1.0)
        ax.set(xlabel=AXES[0].title, ylabel="Loss (nats per token)")
        ax.set_title(run["name"] if len(runs) > 1 else "", loc="left", fontsize=9, color=palette.INK)
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def _highest(entry: dict[str, Any]) -> float:
    """Loss that a panel must reach to show all of a checkpoint."""
    return max([entry["full_loss"], *(found["quantiles"]["0.95"] for found in entry["subnetworks"])])


def _draw_subnetworks(ax: Axes, run: dict[str, Any], at: list[int], rank: int, label: str) -> None:
    spreads = [entry["subnetworks"][rank - 1] for entry in run["checkpoints"]]
    mean = np.array([found["mean"] for found in spreads])
    reach = [
        (found["mean"] - found["quantiles"]["0.05"], found["quantiles"]["0.95"] - found["mean"]) for found in spreads
    ]
    ax.errorbar(
        at,
        mean,
        yerr=np.clip(np.array(reach).T, 0, None),
        color=palette.series(rank),
        marker=_MARKERS[rank % len(_MARKERS)],
        markersize=4.5,
        linewidth=0.9,
        linestyle=(0, (3, 2)),
        capsize=2,
        label=f"subnetworks, {label} (mean, 5–95%)",
    )


def _kept(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate != 1)


def _spread(runs: Sequence[dict[str, Any]]) -> Figure | None:
    """Every sampled subnetwork of the newest checkpoint, as far above the full model as its loss is."""
    rows = [(run, found, rank) for run in runs for rank, found in enumerate(run["checkpoints"][-1]["subnetworks"], 1)]
    if not rows:
        return None
    figure = Figure(figsize=(_WIDTH, 1.0 + 0.42 * len(rows)))
    ax = figure.subplots()
    for y, (run, found, rank) in enumerate(rows):
        above = np.array(found["losses"]) - run["checkpoints"][-1]["full_loss"]
        colour = palette.series(rank)
        ax.boxplot(
            above,
            positions=[y],
            orientation="horizontal",
            widths=0.5,
            whis=(5, 95),
            showfliers=False,
            boxprops={"color": colour},
            whiskerprops={"color": colour},
            capprops={"color": colour},
            medianprops={"color": colour, "linewidth": 2},
        )
        ax.plot(above, np.full(len(above), y), "|", color=palette.INK, markersize=7, markeredgewidth=0.7, alpha=0.6)
    ax.axvline(0, color=palette.SERIES[0], linewidth=1.2)
    names = [
        f"{run['name']}: {_kept(found['rates'])}" if len(runs) > 1 else _kept(found["rates"]) for run, found, _ in rows
    ]
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("Loss of a subnetwork above the full model’s (nats per token)")
    ax.grid(axis="y", visible=False)
    return figure


def _sharpness(runs: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(_WIDTH, max(2.6, 1.2 + 0.4 * len(runs))))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    values = [run["sharpness"]["largest_eigenvalue"] for run in runs]
    for y, (run, value) in enumerate(zip(runs, values, strict=True)):
        left.barh(y, value, height=0.55, color=palette.series(y))
        left.annotate(f"{value:.4g}", (max(value, 0), y), xytext=(4, 0), textcoords="offset points", va="center")
        sizes = [found["relative_norm"] for found in run["perturbation"]]
        means = [found["mean"] for found in run["perturbation"]]
        deviations = [found["std"] for found in run["perturbation"]]
        right.errorbar(
            sizes,
            means,
            yerr=deviations,
            color=palette.series(y),
            marker=_MARKERS[y % len(_MARKERS)],
            markersize=5,
            linewidth=1.2,
            capsize=2.5,
            label=run["name"],
        )
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
