"""The report's figures: each is drawn once, then written as PNG, or as SVG into the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from est_cli.reports import style
from est_cli.reports.comparison import Arm, Comparison, StageTime, stage_times, swept_pairs
from est_cli.reports.coverage import Coverage
from est_cli.reports.curves import (
    FLOPS,
    SECONDS,
    STEPS,
    Axis,
    Curve,
    curve,
    final_loss_window,
    known_axes,
    run_with_shared_stages,
    train_curve,
)
from est_cli.reports.records import RunRecord
from est_cli.subnet.schedule import Rates, Stage
from est_cli.units import format_loss, format_setting, format_step_time

_PANEL, _NARROW = 4.5, 3.9
_MOST_MARKERS = 40
_CORNER = (0.47, 0.4, 0.51, 0.5)
"""Of a loss plot, where its end is shown again: left, bottom, width and height, as shares of the axes."""
_TRAINING, _GREY, _VALIDATION = 2, 2.5, 4
"""The zorder of the lines of a loss plot."""
_BOTH_ACCOUNTINGS = (("flops/saved", "-", "whole model"), ("flops/saved_blocks", (0, (4, 2)), "blocks alone"))
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
        found += [_loss_drawing(comparison, axis) for axis in known_axes(comparison)]
        text = "Share of FLOPs saved so far, for the whole model and for the transformer blocks alone"
        figure = _figure(_PANEL, 3.1, draw_savings, comparison, STEPS)
        found.append(Drawing("savings", text, figure, axis=STEPS, hover="saved"))
        if groups := _shown_stage_times(comparison):
            height = max(3.1, 0.75 + 0.27 * sum(map(len, groups)) + 0.12 * len(groups))
            figure = _figure(_PANEL, height, draw_stage_times, comparison, groups)
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
    figure = Figure(figsize=(style.WIDE, 8.4 + _legend_height(comparison)))
    cells = iter(figure.subplots(3, 2).flat)
    for axis in known_axes(comparison):
        draw_loss(next(cells), comparison, axis, narrow=True)
    draw_savings(next(cells), comparison, STEPS)
    if groups := _shown_stage_times(comparison):
        draw_stage_times(next(cells), comparison, groups)
    for unused in cells:
        unused.set_axis_off()
    _add_legend(figure, comparison)
    return style.laid_out(figure)


def compute_and_time(comparison: Comparison) -> Figure:
    """Loss against the FLOPs of the whole model and against time, side by side."""
    figure = Figure(figsize=(style.WIDE, 3.6 + _legend_height(comparison)))
    for ax, axis in zip(figure.subplots(1, 2), (FLOPS, SECONDS), strict=True):
        draw_loss(ax, comparison, axis, narrow=True)
    _add_legend(figure, comparison)
    return style.laid_out(figure)


def _figure(width: float, height: float, draw: Callable[..., None], *what: Any, **options: Any) -> Figure:
    figure = Figure(figsize=(width, height))
    draw(figure.subplots(), *what, **options)
    return style.laid_out(figure)


def _loss_drawing(comparison: Comparison, axis: Axis) -> Drawing:
    wide = _figure(style.WIDE, 4.1, draw_loss, comparison, axis)
    narrow = _figure(_NARROW, 3.2, draw_loss, comparison, axis, narrow=True)
    text = f"Training and validation loss against {axis.title.lower()}"
    return Drawing(f"loss_{axis.key}", text, wide, narrow, axis, "loss")


def _legend_height(comparison: Comparison) -> float:
    return 0.0 if comparison.single else 0.22 * -(-len(comparison.coloured_arms) // 2) + 0.1


def _add_legend(figure: Figure, comparison: Comparison) -> None:
    if comparison.single:
        return
    arms = comparison.coloured_arms
    lines = [Line2D([], [], color=style.series(arm.rank), linewidth=2) for arm in arms]
    labels = [f"{arm.letter}  {arm.label}" for arm in arms]
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)


def draw_loss(ax: Axes, comparison: Comparison, axis: Axis, narrow: bool = False) -> None:
    """Validation loss of the full model (dots) over the training loss of the subnetworks (faint)."""
    scale, title = axis.unit(comparison.runs)
    ends: list[tuple[Curve, str, str]] = []
    shown: list[Curve] = []
    for arm in reversed(comparison.arms):
        for position, run in enumerate(arm.runs):
            train, val = train_curve(run, axis, scale), curve(run, axis, "val/loss", scale)
            _draw_run(ax, comparison, arm, train, val)
            shown += [train, val]
            if comparison.single:
                ends.append((val, style.SERIES[0], "validation" if narrow else "validation, full model"))
                ends.append((train, style.SERIES[1], "training"))
            elif position == 0 and arm.coloured:
                ends.append((val if len(val) else train, style.series(arm.rank), _label(arm, narrow)))
    if limits := final_loss_window(shown):
        ax.set_ylim(*limits)
    ax.set_xlim(0, max((float(c.x[-1]) for c in shown if len(c)), default=1.0))
    draw_stages(ax, comparison, axis, scale)
    _label_ends(ax, ends)
    _magnify_end(ax, comparison, narrow)
    ax.set_xlabel(title)
    ax.set_ylabel("Loss (nats per token)")


def _draw_run(ax: Axes, comparison: Comparison, arm: Arm, train: Curve, val: Curve) -> None:
    colour = style.series(arm.rank)
    most_points = min(500, max(100, 3000 // len(comparison.runs)))
    train, val = train.thinned(most_points), val.thinned(most_points)
    if comparison.single:
        ax.plot(train.x, train.y, color=style.SERIES[1], linewidth=1.1, zorder=_TRAINING)
    elif arm.coloured:
        ax.plot(train.x, train.y, color=colour, linewidth=0.7, alpha=0.35, zorder=_TRAINING)
    one = len(arm.runs) == 1
    ax.plot(
        val.x,
        val.y,
        color=colour,
        linewidth=0.8 if not arm.coloured else 1.8 if one else 1.2,
        solid_capstyle="round",
        zorder=_VALIDATION if arm.coloured else _GREY,
        marker="o" if arm.coloured and len(val) <= _MOST_MARKERS else "",
        markersize=3.2 if one else 2.4,
    )


def _label(arm: Arm, narrow: bool) -> str:
    if narrow:
        return arm.letter
    seeds = f" (n={len(arm.runs)})" if len(arm.runs) > 1 else ""
    return f"{arm.letter}\u2002{arm.label}{seeds}\u2002{format_loss(arm.mean('val_loss'))}"


def _magnify_end(ax: Axes, comparison: Comparison, narrow: bool) -> None:
    """Shows the last 40% again, larger, in the corner that a falling curve leaves empty."""
    low, high = 0.6 * ax.get_xlim()[1], ax.get_xlim()[1]
    wanted = (_VALIDATION, _TRAINING) if comparison.single else (_VALIDATION,)
    lines = [line for line in ax.lines if line.get_zorder() in wanted and len(_points(line)[0]) > 2]
    late = [y[(x >= low) & (x <= high)] for x, y in map(_points, lines)]
    late = np.concatenate([[], *late])
    if not len(late) or np.ptp(late) == 0 or not _corner_is_empty(ax):
        return
    inset = ax.inset_axes(_CORNER, facecolor=style.PAPER, zorder=6)
    inset.set_in_layout(False)
    for line in ax.lines:
        if line.get_zorder() in wanted:
            look = {key: getattr(line, f"get_{key}")() for key in ("color", "marker", "markersize")}
            inset.plot(*_points(line), linewidth=line.get_linewidth() * 0.9, **look)
    room = 0.05 * np.ptp(late)
    inset.set(xlim=(low, high), ylim=(late.min() - room, late.max() + room))
    inset.locator_params(nbins=3 if narrow else 5)
    inset.tick_params(labelsize=6 if narrow else 7)
    inset.spines[:].set_visible(True)
    inset.spines[:].set_color(style.GRID)
    inset.set_title("the end, larger", fontsize=6 if narrow else 7.5, loc="right", color=style.MUTED, pad=-9, x=0.98)


def _corner_is_empty(ax: Axes) -> bool:
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    from_x = left + (_CORNER[0] - 0.06) * (right - left)
    highest = bottom + (_CORNER[1] - 0.08) * (top - bottom)
    lines = [_points(line) for line in ax.lines if line.get_zorder() in (_TRAINING, _GREY, _VALIDATION)]
    return all((y[x >= from_x] <= highest).all() for x, y in lines)


def _points(line: Line2D) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def draw_savings(ax: Axes, comparison: Comparison, axis: Axis) -> None:
    """FLOPs saved so far: of the whole model (solid) and of the transformer blocks, as the paper counts (dashed)."""
    scale, title = axis.unit(comparison.runs)
    ends: list[tuple[Curve, str, str]] = []
    for arm in reversed(comparison.arms):
        for index, (key, dash, what) in enumerate(_BOTH_ACCOUNTINGS):
            saved = curve(arm.runs[0], axis, key, scale)
            saved = Curve(saved.x, 100 * saved.y)
            colour = style.SERIES[index] if comparison.single else style.series(arm.rank)
            thin = saved.thinned()
            ax.plot(thin.x, thin.y, color=colour, linestyle=dash, linewidth=1.6 if arm.coloured else 0.8, zorder=3)
            if comparison.single and len(saved):
                ends.append((saved, colour, f"{what} {saved.y[-1]:.1f}%"))
            elif index == 0 and arm.coloured:
                ends.append((saved, colour, arm.letter))
    highest = max((line.get_ydata().max() for line in ax.lines if len(line.get_ydata())), default=1.0)
    ax.set_xlim(0, max((float(c.x[-1]) for c, _, _ in ends if len(c)), default=1.0))
    ax.set_ylim(0, max(1.0, 1.08 * highest))
    draw_stages(ax, comparison, axis, scale)
    _label_ends(ax, ends)
    ax.set_xlabel(title)
    ax.set_ylabel("FLOPs saved so far (%)")


def _label_ends(ax: Axes, ends: Sequence[tuple[Curve, str, str]]) -> None:
    """Names curves in the right margin at the height where they end, moved apart if they would touch."""
    ends = sorted((end for end in ends if len(end[0])), key=lambda end: end[0].y[-1])
    if not ends:
        return
    (low, high), right = ax.get_ylim(), ax.get_xlim()[1]
    height = ax.figure.get_size_inches()[1] * 72 * ax.get_subplotspec().get_position(ax.figure).height
    wanted = np.clip([(line.y[-1] - low) / (high - low) for line, _, _ in ends], 0, 1)
    for (line, colour, label), y, at in zip(ends, wanted, spread_apart(wanted, 10.5 / max(height, 60.0)), strict=True):
        if line.x[-1] < 0.985 * right:
            ax.plot([line.x[-1], right], [line.y[-1]] * 2, color=colour, linewidth=0.7, linestyle=":", zorder=1)
        ax.plot([1.0, 1.022], [y, at], color=colour, linewidth=1.2, transform=ax.transAxes, clip_on=False, zorder=5)
        place = {"xycoords": "axes fraction", "va": "center", "ha": "left", "annotation_clip": False}
        ax.annotate(label, (1.03, at), fontsize=8.5, color=style.INK, **place)


def spread_apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Heights in [0, 1] close to the ascending `wanted`, and at least `gap` apart if there is room."""
    at = np.array(wanted, dtype=float)
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    at[-1] = min(at[-1], 1.0)
    for i in range(len(at) - 2, -1, -1):
        at[i] = min(at[i], at[i + 1] - gap)
    return at


def draw_stages(ax: Axes, comparison: Comparison, axis: Axis, scale: float) -> None:
    """Bands behind the curves, darker for smaller subnetworks. If stages disagree, a strip above for every arm."""
    shared = run_with_shared_stages(comparison, axis)
    if shared is None:
        _draw_strips(ax, comparison, axis, scale)
        return
    for stage, low, high in _stretches(shared, axis, scale, ax.get_xlim()[1]):
        ax.axvspan(low, high, color=style.BAND, alpha=0.42 * _smallness(stage.kept), linewidth=0, zorder=0)
        if low > 0:
            ax.axvline(low, color=style.MUTED, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)
        share = (high - low) / (ax.get_xlim()[1] - ax.get_xlim()[0])
        text = "" if share < 0.03 else str(stage.number) if share < 0.14 else f"stage {stage.number}"
        text += ", full model" if stage.is_full and share > 0.3 else ""
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, -4), "textcoords": "offset points"}
        ax.annotate(text, ((low + high) / 2, 1), ha="center", va="top", fontsize=7.5, color=style.MUTED, **place)


def _draw_strips(ax: Axes, comparison: Comparison, axis: Axis, scale: float) -> None:
    arms = [arm for arm in comparison.coloured_arms if any(run.n_rows for run in arm.runs)]
    height = _STRIP_POINTS / (72 * ax.figure.get_size_inches()[1] * 0.75)
    for row, arm in enumerate(reversed(arms)):
        bottom = 1.012 + 1.25 * height * row
        run = max(arm.runs, key=lambda run: run.steps_done)
        for stage, low, high in _stretches(run, axis, scale, axis.at_step(run, run.steps_done) / scale):
            look = {"color": style.series(arm.rank), "alpha": 0.1 + 0.9 * _smallness(stage.kept), "linewidth": 0}
            place = {"transform": ax.get_xaxis_transform(), "clip_on": False}
            ax.add_patch(Rectangle((low, bottom), high - low, height, **look, **place))


def _stretches(run: RunRecord, axis: Axis, scale: float, end: float) -> list[tuple[Stage, float, float]]:
    """The stages that have begun, and where each lies on the axis."""
    begun = [stage for stage in run.stages if stage.first_step < run.steps_done]
    edges = [*(axis.at_step(run, stage.first_step) / scale for stage in begun), end]
    return list(zip(begun, edges[:-1], edges[1:], strict=True))


def _smallness(rates: Rates) -> float:
    """0 for the full model; near 1 for a subnetwork that keeps almost nothing."""
    kept = rates.layers * (rates.heads + rates.mlp) / 2
    return 1 - kept if np.isfinite(kept) else 0.0


def _shown_stage_times(comparison: Comparison) -> list[list[StageTime]]:
    """The best arms' stages, arm by arm."""
    return [times for times in map(stage_times, comparison.arms[:_MOST_STAGE_TIME_ARMS]) if times]


def draw_stage_times(ax: Axes, comparison: Comparison, groups: Sequence[Sequence[StageTime]]) -> None:
    """Boxes of 25–75%, whiskers of 5–95%; a diamond where the FLOPs alone would put the median."""
    entries = [entry for group in groups for entry in group]
    scale, unit = (1.0, "seconds") if max(entry.median for entry in entries) >= 1 else (1e-3, "milliseconds")
    at, y = [], 0.0
    for group in groups:
        for entry in group:
            _draw_box(ax, entry, y, scale, style.SERIES[0] if comparison.single else style.series(entry.arm.rank))
            at.append(y)
            y += 1
        y += 0.45
    before = "stage " if comparison.single else "{} · "
    ax.set_yticks(at, [f"{before.format(entry.arm.letter)}{entry.stage.number}" for entry in entries])
    ax.set_ylim(y - 0.85, -0.7)
    ax.set_xlim(0, 1.34 * max(float(np.percentile(entry.step_s, 95)) for entry in entries) / scale)
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
        look = {"marker": "D", "markersize": 4.5, "markerfacecolor": "none", "markeredgewidth": 0.9}
        expected = entry.flops_ratio * entry.full_step_s / scale
        ax.plot([expected], [y], linestyle="none", color=style.INK, zorder=5, **look)
    ax.annotate(text, (high, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=style.INK)


def sweep_grid(comparison: Comparison, pair: tuple[str, str]) -> tuple[list[Any], list[Any], np.ndarray, np.ndarray]:
    """Row values, column values, and [rows, columns] of mean final validation loss (NaN: none yet) and of runs."""
    by_row, by_column = (comparison.differing[key].values for key in pair)
    rows, columns = _ordered(by_row), _ordered(by_column)
    total, n = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), dtype=int)
    for run, row, column in zip(comparison.runs, by_row, by_column, strict=True):
        loss = run.outcome["val_loss"]
        if np.isfinite(loss):
            cell = (rows.index(row), columns.index(column))
            total[cell] += loss
            n[cell] += 1
    with np.errstate(invalid="ignore"):
        return rows, columns, total / n, n


def _ordered(values: Sequence[Any]) -> list[Any]:
    distinct = list({repr(value): value for value in values}.values())
    numeric = all(isinstance(value, int | float) for value in distinct)
    return sorted(distinct) if numeric else sorted(distinct, key=lambda value: (value is not None, str(value)))


def draw_sweep(ax: Axes, comparison: Comparison, pair: tuple[str, str]) -> None:
    """A heat map of the final validation loss. Lower is better and brighter; the best cell is framed."""
    rows, columns, loss, n = sweep_grid(comparison, pair)
    drawn = ax.imshow(loss, cmap=matplotlib.colormaps[style.HEAT_MAP].reversed(), aspect="auto", interpolation="none")
    ax.set_xticks(range(len(columns)), [_shortened(value) for value in columns])
    ax.set_yticks(range(len(rows)), [_shortened(value) for value in rows])
    ax.set_ylabel(pair[0])
    ax.set_xlabel(pair[1])
    style.bare(ax)
    for (row, column), value in np.ndenumerate(loss):
        known = np.isfinite(value)
        text = f"{value:.3f}" + (f"\nn={n[row, column]}" if n.max() > 1 else "") if known else "no result"
        colour = style.text_on(drawn.cmap(drawn.norm(value))) if known else style.MUTED
        ax.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)
    if np.isfinite(loss).any():
        row, column = np.unravel_index(np.nanargmin(loss), loss.shape)
        look = {"fill": False, "edgecolor": style.INK, "linewidth": 2.2, "clip_on": False, "zorder": 5}
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **look))


def _shortened(value: Any) -> str:
    text = format_setting(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def draw_coverage(found: Coverage) -> Figure:
    """Three heat strips that share the layers as rows; colour runs from never (0%) to every step (100%)."""
    n_layers, n_heads = found.heads.shape
    figure = Figure(figsize=(style.WIDE, float(np.clip(1.3 + 0.2 * n_layers, 2.2, 5.5))))
    widths = [0.5, float(np.clip(n_heads / 12, 1.2, 2.4)), 3.4]
    axes = layers_ax, heads_ax, blocks_ax = figure.subplots(1, 3, sharey=True, width_ratios=widths)
    _draw_strip(layers_ax, found.layers[:, None], "Layer")
    _draw_strip(heads_ax, found.heads, "Heads")
    per_block = f", {found.neurons_per_block} a block" if found.neurons_per_block > 1 else ""
    drawn = _draw_strip(blocks_ax, found.blocks, f"MLP neurons{per_block}")
    layers_ax.set(xticks=[], ylabel="Layer", yticks=_ticks(n_layers))
    heads_ax.set(xticks=_ticks(n_heads), xlabel="Head")
    blocks_ax.set(xticks=_ticks(found.blocks.shape[1]), xlabel="Block")
    bar = figure.colorbar(drawn, ax=list(axes), fraction=0.025, pad=0.015)
    bar.set_ticks([0, 50, 100], labels=["0%", "50%", "100%"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return style.laid_out(figure)


def _draw_strip(ax: Axes, shares: np.ndarray, title: str) -> AxesImage:
    colours = {"vmin": 0, "vmax": 100, "cmap": matplotlib.colormaps[style.HEAT_MAP]}
    drawn = ax.imshow(100 * shares, **colours, aspect="auto", interpolation="none")
    if shares.size <= _MOST_NUMBERED_CELLS and shares.shape[1] <= 12 and len(shares) <= 16:
        for (row, column), share in np.ndenumerate(shares):
            colour = style.text_on(drawn.cmap(drawn.norm(100 * share)))
            ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    low, high = f"{100 * shares.min():.0f}", f"{100 * shares.max():.0f}"
    span = low if low == high else f"{low}–{high}"
    ax.set_title(f"{title}\n{span}%", fontsize=8.5, loc="left", color=style.INK)
    style.bare(ax)
    return drawn


def _ticks(n: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if n / step <= 12)
    return list(range(0, n, step))
