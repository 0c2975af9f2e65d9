"""The stages of the schedule behind curves."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from est_cli.reports import palette
from est_cli.reports.arms import Comparison
from est_cli.reports.axes import Axis, run_with_shared_stages
from est_cli.reports.records import RunRecord
from est_cli.subnet.schedule import Rates, Stage

_STRIP_POINTS = 5.0


def draw_stages(ax: Axes, comparison: Comparison, axis: Axis, scale: float) -> None:
    """Bands behind the curves, darker for smaller subnetworks; a strip above for every arm where stages disagree."""
    shared = run_with_shared_stages(comparison, axis)
    if shared is None:
        _draw_strips(ax, comparison, axis, scale)
        return
    for stage, low, high in _stretches(shared, axis, scale, ax.get_xlim()[1]):
        ax.axvspan(low, high, color=palette.BAND, alpha=0.42 * _smallness(stage.kept), linewidth=0, zorder=0)
        if low > 0:
            ax.axvline(low, color=palette.MUTED, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)
        _name_stage(ax, stage, low, high)


def _stretches(run: RunRecord, axis: Axis, scale: float, end: float) -> list[tuple[Stage, float, float]]:
    """The stages that have begun, and where each lies on the axis."""
    begun = [stage for stage in run.stages if stage.first_step < run.steps_done]
    edges = [*(axis.at_step(run, stage.first_step) / scale for stage in begun), end]
    return list(zip(begun, edges[:-1], edges[1:], strict=True))


def _name_stage(ax: Axes, stage: Stage, low: float, high: float) -> None:
    share = (high - low) / (ax.get_xlim()[1] - ax.get_xlim()[0])
    text = "" if share < 0.03 else str(stage.number) if share < 0.14 else f"stage {stage.number}"
    text += ", full model" if stage.is_full and share > 0.3 else ""
    ax.annotate(
        text,
        ((low + high) / 2, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=7.5,
        color=palette.MUTED,
    )


def _smallness(rates: Rates) -> float:
    """0 for the full model; near 1 for a subnetwork that is hardly there."""
    kept = rates.layers * (rates.heads + rates.mlp) / 2
    return 1 - kept if np.isfinite(kept) else 0.0


def _draw_strips(ax: Axes, comparison: Comparison, axis: Axis, scale: float) -> None:
    arms = [arm for arm in comparison.arms if arm.coloured and any(run.n_rows for run in arm.runs)]
    height = _STRIP_POINTS / (72 * ax.figure.get_size_inches()[1] * 0.75)
    for row, arm in enumerate(reversed(arms)):
        bottom = 1.012 + 1.25 * height * row
        run = max(arm.runs, key=lambda run: run.steps_done)
        for stage, low, high in _stretches(run, axis, scale, axis.at_step(run, run.steps_done) / scale):
            ax.add_patch(
                Rectangle(
                    (low, bottom),
                    high - low,
                    height,
                    transform=ax.get_xaxis_transform(),
                    color=palette.series(arm.rank),
                    alpha=0.1 + 0.9 * _smallness(stage.kept),
                    linewidth=0,
                    clip_on=False,
                )
            )
