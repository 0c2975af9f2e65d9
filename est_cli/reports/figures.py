"""The report's figures: each drawn once, then written as PNG, or as SVG into the page."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from est_cli.reports import palette
from est_cli.reports.arms import Comparison
from est_cli.reports.axes import AXES, Axis, known_axes
from est_cli.reports.coverage import Coverage
from est_cli.reports.coverage_plot import coverage_height, draw_coverage
from est_cli.reports.loss_plot import draw_loss, draw_savings
from est_cli.reports.stage_time_plot import draw_stage_times, rows_height, shown_stage_times
from est_cli.reports.sweep_plot import draw_sweep, sweep_grid

_WIDE, _PANEL, _NARROW = 9.2, 4.5, 3.9

_STYLE = {
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    # A dollar sign in a run's name is not mathematics.
    "text.parse_math": False,
    "text.color": palette.INK,
    "axes.labelcolor": palette.MUTED,
    "axes.edgecolor": palette.MUTED,
    "xtick.color": palette.MUTED,
    "ytick.color": palette.MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": palette.GRID,
    "grid.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "est",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Drawing:
    """A figure and, for curves, a second one for narrow windows."""

    name: str
    """Also the PNG's file name."""
    description: str
    """What it shows, for people who cannot see it."""
    figure: Figure
    narrow: Figure | None = None
    axis: Axis | None = None
    hover: str | None = None
    """Which of the page's curves its pointer shows: `loss` or `saved`."""


@contextmanager
def report_style() -> Iterator[None]:
    """Figures made and saved inside look the same whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def laid_out(figure: Figure) -> Figure:
    """The figure with its axes in place, once and for all: otherwise every file that it is saved to finds it twice."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    return figure


def loss_drawings(comparison: Comparison) -> list[Drawing]:
    """Loss against each axis that the runs know."""
    return [
        Drawing(
            f"loss_{axis.key}",
            f"Training and validation loss against {axis.title.lower()}",
            _curves(draw_loss, comparison, axis, _WIDE, 4.1),
            _curves(draw_loss, comparison, axis, _NARROW, 3.2, narrow=True),
            axis,
            "loss",
        )
        for axis in known_axes(comparison)
    ]


def savings_drawing(comparison: Comparison) -> Drawing:
    return Drawing(
        "savings",
        "Share of FLOPs saved so far, for the whole model and for the transformer blocks alone",
        _curves(draw_savings, comparison, AXES[0], _PANEL, 3.1),
        axis=AXES[0],
        hover="saved",
    )


def stage_time_drawing(comparison: Comparison) -> Drawing | None:
    """None where no run has logged a step time."""
    groups = shown_stage_times(comparison)
    if not groups:
        return None
    figure = Figure(figsize=(_PANEL, max(3.1, rows_height(groups))))
    draw_stage_times(figure.subplots(), comparison, groups)
    return Drawing("stage_time", "Time of an optimizer step in every stage", laid_out(figure))


def sweep_drawing(comparison: Comparison, pair: tuple[str, str], number: int) -> Drawing:
    rows, columns, _, _ = sweep_grid(comparison, pair)
    figure = Figure(figsize=(min(_WIDE, 1.6 + 0.85 * len(columns)), 0.9 + 0.55 * len(rows)))
    draw_sweep(figure.subplots(), comparison, pair)
    return Drawing(f"sweep_{number}", f"Final validation loss over {pair[0]} and {pair[1]}", laid_out(figure))


def coverage_drawing(found: Coverage) -> Drawing:
    figure = Figure(figsize=(_WIDE, coverage_height(found)))
    draw_coverage(figure, found)
    return Drawing(
        "coverage", "Share of optimizer steps in which every layer, head and neuron block was trained", laid_out(figure)
    )


def overview(comparison: Comparison) -> Figure:
    """One figure for a paper or a README: loss against every axis, savings and step time."""
    axes, groups = known_axes(comparison), shown_stage_times(comparison)
    figure = Figure(figsize=(_WIDE, 8.4 + _legend_height(comparison)))
    cells = iter(figure.subplots(3, 2).flat)
    for axis in axes:
        draw_loss(next(cells), comparison, axis, narrow=True)
    draw_savings(next(cells), comparison, AXES[0], narrow=True)
    if groups:
        draw_stage_times(next(cells), comparison, groups)
    for unused in cells:
        unused.set_axis_off()
    _add_legend(figure, comparison)
    return laid_out(figure)


def compute_and_time(comparison: Comparison) -> Figure:
    """Loss against the FLOPs of the whole model and against time, side by side."""
    figure = Figure(figsize=(_WIDE, 3.6 + _legend_height(comparison)))
    for ax, axis in zip(
        figure.subplots(1, 2), (axis for axis in AXES if axis.key in ("flops", "seconds")), strict=True
    ):
        draw_loss(ax, comparison, axis, narrow=True)
    _add_legend(figure, comparison)
    return laid_out(figure)


def _legend_height(comparison: Comparison) -> float:
    return 0.0 if comparison.single else 0.22 * -(-min(len(comparison.arms), 7) // 2) + 0.1


def _add_legend(figure: Figure, comparison: Comparison) -> None:
    if comparison.single:
        return
    lines = [Line2D([], [], color=palette.series(arm.rank), linewidth=2) for arm in comparison.arms if arm.coloured]
    labels = [f"{arm.letter}  {arm.label}" for arm in comparison.arms if arm.coloured]
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)


def save_png(figure: Figure, path: Path) -> None:
    """On white, sharp enough for print."""
    figure.savefig(path, dpi=150, facecolor="white", pil_kwargs={"compress_level": 3})


def _curves(draw, comparison: Comparison, axis: Axis, width: float, height: float, **options) -> Figure:
    figure = Figure(figsize=(width, height))
    draw(figure.subplots(), comparison, axis, **options)
    return laid_out(figure)
