"""The report's figures: each is drawn once, then written as PNG, or as SVG into the page."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from est_cli.reports import style
from est_cli.reports.comparison import Arm, Comparison, StageTime, shortened, swept_pairs
from est_cli.reports.coverage import Coverage
from est_cli.reports.curves import Axis, Curve, final_loss_window, known_axes, run_with_shared_stages
from est_cli.reports.records import RunRecord
from est_cli.subnet.schedule import Rates, Stage
from est_cli.units import format_loss, format_percent, format_setting, format_step_time

_PANEL = 4.5
_MOST_MARKERS = 40
_CORNER = (0.47, 0.4, 0.51, 0.5)
"""Where a loss plot shows its end again: left, bottom, width and height, as shares of the axes."""
_BOTH_ACCOUNTINGS = (("flops/saved", "-", "whole model"), ("flops/saved_blocks", (0, (4, 2)), "only blocks"))
_STRIP_POINTS = 5.0
_MOST_STAGE_TIME_ARMS = 6
_LONGEST_VALUE = 24
_MOST_NUMBERED_CELLS = 64


@dataclass(frozen=True)
class Drawing:
    """A figure of the page and, for curves, a second one for narrow windows."""

    name: str
    """Also the PNG's file name."""
    description: str
    """What it shows, for people who cannot see it."""
    figure: Figure
    narrow: Figure | None = None
    axis: Axis | None = None
    hover: str | None = None
    """Which of the page's curves the pointer shows: `loss` or `saved`."""


def drawings(comparison: Comparison, coverage: Coverage | str) -> list[Drawing]:
    """All figures that these runs have something for, in the order of the page."""
    found = []
    if any(run.n_rows for run in comparison.runs):
        for axis in known_axes(comparison.runs):
            wide = _figure(style.WIDE, 4.1, draw_loss, comparison, axis)
            narrow = _figure(3.9, 3.2, draw_loss, comparison, axis, narrow=True)
            text = f"Training and validation loss against {axis.title.lower()}"
            found.append(Drawing(f"loss_{axis.key}", text, wide, narrow, axis, "loss"))
        text = "Share of FLOPs saved so far, for the whole model and for its transformer blocks"
        figure = _figure(_PANEL, 3.1, draw_savings, comparison)
        found.append(Drawing("savings", text, figure, axis=Axis.of("steps", comparison.runs), hover="saved"))
        if arms := _timed_arms(comparison):
            height = max(3.1, 0.75 + 0.27 * sum(len(arm.stage_times) for arm in arms) + 0.12 * len(arms))
            figure = _figure(_PANEL, height, draw_stage_times, comparison)
            found.append(Drawing("stage_time", "Time of an optimizer step in every stage", figure))
    for number, pair in enumerate(swept_pairs(comparison.differing), 1):
        rows, columns, *_ = sweep_grid(comparison, pair)
        width = min(style.WIDE, 1.6 + 0.85 * len(columns))
        figure = _figure(width, 0.9 + 0.55 * len(rows), draw_sweep, comparison, pair)
        found.append(Drawing(f"sweep_{number}", f"Final validation loss over {pair[0]} and {pair[1]}", figure))
    if not isinstance(coverage, str):
        text = "Share of optimizer steps in which every layer, head and neuron block was trained"
        found.append(Drawing("coverage", text, draw_coverage(coverage)))
    return found


def overview(comparison: Comparison) -> Figure:
    """One figure for a paper or a README: loss against every axis, savings and step time."""
    draws = [partial(draw_loss, axis=axis, narrow=True) for axis in known_axes(comparison.runs)]
    draws += [draw_savings, draw_stage_times] if _timed_arms(comparison) else [draw_savings]
    return _sheet(comparison, draws, n_rows=3, height=8.4)


def compute_and_time(comparison: Comparison) -> Figure:
    """Loss against the FLOPs of the whole model and against time, side by side."""
    axes = [Axis.of(key, comparison.runs) for key in ("flops", "seconds")]
    return _sheet(comparison, [partial(draw_loss, axis=axis, narrow=True) for axis in axes], n_rows=1, height=3.6)


def _figure(width: float, height: float, draw: Callable[..., None], *what: Any, **options: Any) -> Figure:
    figure = Figure(figsize=(width, height))
    draw(figure.subplots(), *what, **options)
    return figure


def _sheet(
    comparison: Comparison, draws: Sequence[Callable[[Axes, Comparison], None]], n_rows: int, height: float
) -> Figure:
    """Plots in two columns over one legend of all arms."""
    arms = [] if comparison.single else comparison.coloured_arms
    figure = Figure(figsize=(style.WIDE, height + 0.22 * -(-len(arms) // 2) + 0.1 * bool(arms)))
    for ax, draw in zip_longest(figure.subplots(n_rows, 2).flat, draws):
        draw(ax, comparison) if draw else ax.set_axis_off()
    if arms:
        lines = [Line2D([], [], color=style.series(arm.rank), linewidth=2) for arm in arms]
        labels = [f"{arm.letter}  {arm.label}" for arm in arms]
        figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


class _Line(NamedTuple):
    """A curve, and how it looks. A label names it in the right margin; a magnified end is drawn again in the corner."""

    curve: Curve
    look: dict[str, Any]
    label: str = ""
    magnified: bool = False


def draw_loss(ax: Axes, comparison: Comparison, axis: Axis, narrow: bool = False) -> None:
    """Validation loss of the full model (dots) over the training loss of the subnetworks (faint)."""
    lines = [
        line
        for arm in reversed(comparison.arms)
        for run in arm.runs
        for line in _loss_lines(comparison, arm, run, axis, narrow)
    ]
    _draw_lines(ax, lines, comparison, axis, final_loss_window([line.curve for line in lines]))
    _magnify_end(ax, lines, narrow)
    ax.set_ylabel("Loss (nats per token)")


def _loss_lines(comparison: Comparison, arm: Arm, run: RunRecord, axis: Axis, narrow: bool) -> list[_Line]:
    most_points = min(500, max(100, 3000 // len(comparison.runs)))
    train, val = (Curve.of(run, axis, key).thinned(most_points) for key in ("train/loss_smoothed", "val/loss"))
    colour, one = style.series(arm.rank), len(arm.runs) == 1
    if not arm.coloured:
        return [_Line(val, {"color": colour, "linewidth": 0.8, "zorder": 2.5})]
    validation = {"color": colour, "linewidth": 1.8 if one else 1.2, "zorder": 4, "solid_capstyle": "round"}
    if len(val) <= _MOST_MARKERS:
        validation |= {"marker": "o", "markersize": 3.2 if one else 2.4}
    if comparison.single:
        training = {"color": style.SERIES[1], "linewidth": 1.1, "zorder": 2}
        label = "validation" if narrow else "validation, full model"
        return [_Line(train, training, "training", magnified=True), _Line(val, validation, label, magnified=True)]
    training = {"color": colour, "linewidth": 0.7, "alpha": 0.35, "zorder": 2}
    label = _label(arm, narrow) if run is arm.runs[0] else ""
    return [_Line(train, training, "" if len(val) else label), _Line(val, validation, label, magnified=True)]


def _label(arm: Arm, narrow: bool) -> str:
    if narrow:
        return arm.letter
    seeds = f" (n={len(arm.runs)})" if len(arm.runs) > 1 else ""
    return f"{arm.letter}\u2002{arm.label}{seeds}\u2002{format_loss(arm.mean('val_loss'))}"


def draw_savings(ax: Axes, comparison: Comparison) -> None:
    """FLOPs saved so far: of the whole model (solid) and of the transformer blocks, as the paper counts (dashed)."""
    axis, lines = Axis.of("steps", comparison.runs), []
    for arm in reversed(comparison.arms):
        for index, (key, dash, what) in enumerate(_BOTH_ACCOUNTINGS):
            saved = Curve.of(arm.runs[0], axis, key).thinned()
            label = arm.letter if index == 0 and arm.coloured else ""
            if comparison.single and len(saved):
                label = f"{what} {format_percent(saved.y[-1])}"
            colour = style.SERIES[index] if comparison.single else style.series(arm.rank)
            look = {"color": colour, "linestyle": dash, "linewidth": 1.6 if arm.coloured else 0.8, "zorder": 3}
            lines.append(_Line(Curve(saved.x, 100 * saved.y), look, label))
    highest = max((line.curve.y.max() for line in lines if len(line.curve)), default=1.0)
    _draw_lines(ax, lines, comparison, axis, (0, max(1.0, 1.08 * highest)))
    ax.set_ylabel("FLOPs saved so far (%)")


def _draw_lines(
    ax: Axes, lines: Sequence[_Line], comparison: Comparison, axis: Axis, ylim: tuple[float, float] | None
) -> None:
    for line in lines:
        ax.plot(line.curve.x, line.curve.y, **line.look)
    ax.set(xlim=(0, max((float(line.curve.x[-1]) for line in lines if len(line.curve)), default=1.0)), ylim=ylim)
    ax.set_xlabel(axis.label)
    draw_stages(ax, comparison, axis)
    _label_ends(ax, lines)


def _magnify_end(ax: Axes, lines: Sequence[_Line], narrow: bool) -> None:
    """Shows the last 40% again, larger, in the corner that a falling curve leaves empty."""
    low, high = 0.6 * ax.get_xlim()[1], ax.get_xlim()[1]
    magnified = [line for line in lines if line.magnified]
    late = np.concatenate([[], *(line.curve.y[line.curve.x >= low] for line in magnified if len(line.curve) > 2)])
    if not len(late) or np.ptp(late) == 0 or not _corner_is_empty(ax, lines):
        return
    inset = ax.inset_axes(_CORNER, facecolor=style.PAPER, zorder=6)
    inset.set_in_layout(False)
    for line in magnified:
        inset.plot(line.curve.x, line.curve.y, **line.look | {"linewidth": 0.9 * line.look["linewidth"]})
    room = 0.05 * np.ptp(late)
    inset.set(xlim=(low, high), ylim=(late.min() - room, late.max() + room))
    inset.locator_params(nbins=3 if narrow else 5)
    inset.tick_params(labelsize=6 if narrow else 7)
    inset.spines[:].set_visible(True)
    inset.spines[:].set_color(style.GRID)
    inset.set_title("the end, larger", fontsize=6 if narrow else 7.5, loc="right", color=style.MUTED, pad=-9, x=0.98)


def _corner_is_empty(ax: Axes, lines: Sequence[_Line]) -> bool:
    left, lowest = (_CORNER[0] - 0.06) * ax.get_xlim()[1], _CORNER[1] - 0.06
    bottom, top = ax.get_ylim()
    return all((line.curve.y[line.curve.x >= left] <= bottom + lowest * (top - bottom)).all() for line in lines)


def _label_ends(ax: Axes, lines: Sequence[_Line]) -> None:
    """Names curves in the right margin at the height where they end, moved apart if they would touch."""
    labelled = sorted((line for line in lines if line.label and len(line.curve)), key=lambda line: line.curve.y[-1])
    if not labelled:
        return
    (low, high), right = ax.get_ylim(), ax.get_xlim()[1]
    height = ax.figure.get_size_inches()[1] * 72 * ax.get_subplotspec().get_position(ax.figure).height
    wanted = np.clip([(line.curve.y[-1] - low) / (high - low) for line in labelled], 0, 1)
    for line, y, at in zip(labelled, wanted, spread_apart(wanted, 10.5 / max(height, 60.0)), strict=True):
        end, colour = (line.curve.x[-1], line.curve.y[-1]), line.look["color"]
        if end[0] < 0.985 * right:
            ax.plot([end[0], right], [end[1], end[1]], color=colour, linewidth=0.7, linestyle=":", zorder=1)
        ax.plot([1.0, 1.022], [y, at], color=colour, linewidth=1.2, transform=ax.transAxes, clip_on=False, zorder=5)
        place = {"xycoords": "axes fraction", "va": "center", "ha": "left", "annotation_clip": False}
        ax.annotate(line.label, (1.03, at), fontsize=8.5, color=style.INK, **place)


def spread_apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Heights in [0, 1] close to the ascending `wanted`, and at least `gap` apart if there is room."""
    at = np.array(wanted, dtype=float)
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    at[-1] = min(at[-1], 1.0)
    for i in range(len(at) - 2, -1, -1):
        at[i] = min(at[i], at[i + 1] - gap)
    return at


def draw_stages(ax: Axes, comparison: Comparison, axis: Axis) -> None:
    """Bands behind the curves, darker for smaller subnetworks. If stages disagree, a strip above for every arm."""
    shared = run_with_shared_stages(comparison.runs, axis)
    if shared is None:
        _draw_strips(ax, comparison, axis)
        return
    right = ax.get_xlim()[1]
    for stage, low, high in _stretches(shared, axis, right):
        ax.axvspan(low, high, color=style.BAND, alpha=0.42 * _smallness(stage.kept), linewidth=0, zorder=0)
        if low > 0:
            ax.axvline(low, color=style.MUTED, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)
        share = (high - low) / right
        text = "" if share < 0.03 else str(stage.number) if share < 0.14 else f"stage {stage.number}"
        text += ", full model" if stage.is_full and share > 0.3 else ""
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, -4), "textcoords": "offset points"}
        ax.annotate(text, ((low + high) / 2, 1), ha="center", va="top", fontsize=7.5, color=style.MUTED, **place)


def _draw_strips(ax: Axes, comparison: Comparison, axis: Axis) -> None:
    arms = [arm for arm in comparison.coloured_arms if any(run.n_rows for run in arm.runs)]
    height = _STRIP_POINTS / (72 * ax.figure.get_size_inches()[1] * 0.75)
    for row, arm in enumerate(reversed(arms)):
        bottom = 1.012 + 1.25 * height * row
        run = max(arm.runs, key=lambda run: run.steps_done)
        for stage, low, high in _stretches(run, axis, axis.at_step(run, run.steps_done)):
            look = {"color": style.series(arm.rank), "alpha": 0.1 + 0.9 * _smallness(stage.kept), "linewidth": 0}
            place = {"transform": ax.get_xaxis_transform(), "clip_on": False}
            ax.add_patch(Rectangle((low, bottom), high - low, height, **look, **place))


def _stretches(run: RunRecord, axis: Axis, end: float) -> Iterator[tuple[Stage, float, float]]:
    """The stages that have begun, and where each lies on the axis."""
    begun = [stage for stage in run.stages if stage.first_step < run.steps_done]
    edges = [*(axis.at_step(run, stage.first_step) for stage in begun), end]
    return zip(begun, edges[:-1], edges[1:], strict=True)


def _smallness(rates: Rates) -> float:
    """0 for the full model; near 1 for a subnetwork that keeps almost nothing."""
    kept = rates.layers * (rates.heads + rates.mlp) / 2
    return 1 - kept if np.isfinite(kept) else 0.0


def _timed_arms(comparison: Comparison) -> list[Arm]:
    return [arm for arm in comparison.arms[:_MOST_STAGE_TIME_ARMS] if arm.stage_times]


def draw_stage_times(ax: Axes, comparison: Comparison) -> None:
    """Boxes of 25–75%, whiskers of 5–95%; a diamond where the FLOPs alone would put the median."""
    arms = _timed_arms(comparison)
    slowest = max(entry.median for arm in arms for entry in arm.stage_times)
    scale, unit = (1.0, "seconds") if slowest >= 1 else (1e-3, "milliseconds")
    ticks, y = {}, 0.0
    for arm in arms:
        for entry in arm.stage_times:
            _draw_stage_time(ax, entry, y, scale, style.series(arm.rank))
            ticks[y] = f"stage {entry.stage.number}" if comparison.single else f"{arm.letter} · {entry.stage.number}"
            y += 1
        y += 0.45
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.set(xlim=(0, 1.34 * ax.dataLim.x1), ylim=(y - 0.85, -0.7), xlabel=f"Time of a step ({unit})")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def _draw_stage_time(ax: Axes, entry: StageTime, y: float, scale: float, colour: str) -> None:
    style.draw_box(ax, entry.step_s / scale, y, colour)
    text = format_step_time(entry.median)
    if entry.full and not entry.stage.is_full:
        text += f" · {entry.time_ratio:.2f}×"
        look = {"marker": "D", "markersize": 4.5, "markerfacecolor": "none", "markeredgewidth": 0.9}
        expected = entry.flops_ratio * entry.full.median / scale
        ax.plot([expected], [y], linestyle="none", color=style.INK, zorder=5, **look)
    high = np.percentile(entry.step_s, 95) / scale
    ax.annotate(text, (high, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=style.INK)


def sweep_grid(comparison: Comparison, pair: tuple[str, str]) -> tuple[list[Any], list[Any], np.ndarray, np.ndarray]:
    """Row values, column values, and [rows, columns] of mean final validation loss (NaN: none yet) and of runs."""
    by_row, by_column = (comparison.differing[key].values for key in pair)
    rows, columns = _ordered(by_row.values()), _ordered(by_column.values())
    total, n = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), dtype=int)
    for run in comparison.runs:
        loss = run.outcome["val_loss"]
        if np.isfinite(loss):
            cell = rows.index(by_row[run]), columns.index(by_column[run])
            total[cell] += loss
            n[cell] += 1
    with np.errstate(invalid="ignore"):
        return rows, columns, total / n, n


def _ordered(values: Iterable[Any]) -> list[Any]:
    distinct = list({repr(value): value for value in values}.values())
    numeric = all(isinstance(value, int | float) for value in distinct)
    return sorted(distinct) if numeric else sorted(distinct, key=lambda value: (value is not None, str(value)))


def draw_sweep(ax: Axes, comparison: Comparison, pair: tuple[str, str]) -> None:
    """A heat map of the final validation loss. Lower is better and brighter; the best cell is framed."""
    rows, columns, loss, n = sweep_grid(comparison, pair)
    texts = np.full(loss.shape, "no result", dtype=object)
    for cell in zip(*np.nonzero(n), strict=True):
        texts[cell] = f"{loss[cell]:.3f}" + (f"\nn={n[cell]}" if n.max() > 1 else "")
    style.draw_heat_map(ax, loss, texts, fontsize=8.5, cmap="viridis_r")
    for axis, values, key in ((ax.yaxis, rows, pair[0]), (ax.xaxis, columns, pair[1])):
        axis.set_ticks(range(len(values)), [shortened(format_setting(value), _LONGEST_VALUE) for value in values])
        axis.set_label_text(key)
    if n.any():
        row, column = np.unravel_index(np.nanargmin(loss), loss.shape)
        look = {"fill": False, "edgecolor": style.INK, "linewidth": 2.2, "clip_on": False, "zorder": 5}
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **look))


def draw_coverage(found: Coverage) -> Figure:
    """Three heat strips that share the layers as rows; colour runs from never (0%) to every step (100%)."""
    n_layers, n_heads = found.heads.shape
    figure = Figure(figsize=(style.WIDE, float(np.clip(1.3 + 0.2 * n_layers, 2.2, 5.5))))
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[0.5, float(np.clip(n_heads / 12, 1.2, 2.4)), 3.4])
    per_block = f", {found.neurons_per_block} a block" if found.neurons_per_block > 1 else ""
    strips = (
        (found.layers[:, None], "Layer", ""),
        (found.heads, "Heads", "Head"),
        (found.blocks, f"MLP neurons{per_block}", "Block"),
    )
    for ax, (shares, title, unit) in zip(axes, strips, strict=True):
        percent = 100 * shares
        numbered = shares.size <= _MOST_NUMBERED_CELLS and shares.shape[1] <= 12 and n_layers <= 16
        texts = np.vectorize("{:.0f}".format)(percent) if numbered else np.array([])
        drawn = style.draw_heat_map(ax, percent, texts, fontsize=7, vmin=0, vmax=100, cmap="viridis")
        low, high = f"{percent.min():.0f}", f"{percent.max():.0f}"
        span = low if low == high else f"{low}–{high}"
        ax.set_title(f"{title}\n{span}%", fontsize=8.5, loc="left", color=style.INK)
        ax.locator_params(nbins=12, integer=True, min_n_ticks=1)
        ax.set_xlabel(unit)
    axes[0].set(xticks=[], ylabel="Layer")
    bar = figure.colorbar(drawn, ax=list(axes), fraction=0.025, pad=0.015)
    bar.set_ticks([0, 50, 100], labels=["0%", "50%", "100%"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure
