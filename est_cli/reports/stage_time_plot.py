"""The step time of every stage as boxes, against what the FLOPs promise."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from est_cli.reports import palette
from est_cli.reports.arms import Comparison
from est_cli.reports.stage_times import StageTime, stage_times
from est_cli.units import format_step_time

_MOST_ARMS = 6


def shown_stage_times(comparison: Comparison) -> list[list[StageTime]]:
    """The best arms' stages, arm by arm."""
    return [times for times in map(stage_times, comparison.arms[:_MOST_ARMS]) if times]


def rows_height(groups: Sequence[Sequence[StageTime]]) -> float:
    """Inches that the figure needs."""
    return max(2.2, 0.75 + 0.27 * sum(map(len, groups)) + 0.12 * len(groups))


def draw_stage_times(ax: Axes, comparison: Comparison, groups: Sequence[Sequence[StageTime]]) -> None:
    """Boxes of 25–75%, whiskers of 5–95%; a diamond where the FLOPs alone would put the median."""
    scale, unit = (1.0, "seconds") if max(t.median for g in groups for t in g) >= 1 else (1e-3, "milliseconds")
    at, y, names = [], 0.0, []
    for group in groups:
        for entry in group:
            _draw_box(ax, entry, y, scale, palette.SERIES[0] if comparison.single else palette.series(entry.arm.rank))
            names.append(
                f"stage {entry.stage.number}" if comparison.single else f"{entry.arm.letter} · {entry.stage.number}"
            )
            at.append(y)
            y += 1
        y += 0.45
    ax.set_yticks(at, names)
    ax.set_ylim(y - 0.85, -0.7)
    whiskers = [float(np.percentile(entry.step_s, 95)) for group in groups for entry in group]
    ax.set_xlim(0, 1.34 * max(whiskers) / scale)
    ax.set_xlabel(f"Time of a step ({unit})")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def _draw_box(ax: Axes, entry: StageTime, y: float, scale: float, colour: str) -> None:
    low, first, median, third, high = np.percentile(entry.step_s, [5, 25, 50, 75, 95]) / scale
    ax.plot([low, high], [y, y], color=colour, linewidth=1, zorder=2)
    ax.barh(y, third - first, left=first, height=0.55, color=colour, alpha=0.4, linewidth=0, zorder=3)
    ax.plot([median, median], [y - 0.275, y + 0.275], color=colour, linewidth=2.2, zorder=4)
    text = format_step_time(entry.median)
    if np.isfinite(entry.time_ratio) and not entry.stage.is_full:
        text += f" · {entry.time_ratio:.2f}×"
        ax.plot(
            [entry.flops_ratio * entry.full_step_s / scale],
            [y],
            marker="D",
            markersize=4.5,
            zorder=5,
            linestyle="none",
            markerfacecolor="none",
            color=palette.INK,
            markeredgewidth=0.9,
        )
    ax.annotate(text, (high, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=palette.INK)
