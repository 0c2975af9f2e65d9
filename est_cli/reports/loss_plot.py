"""Loss against one axis, and the FLOPs saved: curves over stage bands, labelled where they end."""

import numpy as np
from matplotlib.axes import Axes

from est_cli.reports import palette
from est_cli.reports.arms import Arm, Comparison
from est_cli.reports.axes import Axis
from est_cli.reports.curves import Curve, curve, final_loss_window, train_curve
from est_cli.reports.stage_bands import draw_stages
from est_cli.units import format_loss

_MOST_MARKERS = 40
_CORNER = (0.47, 0.4, 0.51, 0.5)
_TRAINING, _GREY, _VALIDATION = 2, 2.5, 4
_BOTH_ACCOUNTINGS = (("flops/saved", "-"), ("flops/saved_blocks", (0, (4, 2))))


def draw_loss(ax: Axes, comparison: Comparison, axis: Axis, narrow: bool = False) -> None:
    """Validation loss of the full model (dots) over the training loss of the subnetworks (faint)."""
    scale, title = axis.unit(comparison.runs)
    ends: list[tuple[Curve, str, str]] = []
    shown: list[Curve] = []
    for arm in reversed(comparison.arms):
        for position, run in enumerate(arm.runs):
            train = _scaled(train_curve(run, axis), scale)
            val = _scaled(curve(run, axis, "val/loss"), scale)
            _draw_run(ax, comparison, arm, train, val)
            shown += [train, val]
            if comparison.single:
                ends += [
                    (val, palette.SERIES[0], "validation" if narrow else "validation, full model"),
                    (train, palette.SERIES[1], "training"),
                ]
            elif position == 0 and arm.coloured:
                ends.append((val if len(val) else train, palette.series(arm.rank), _label(arm, narrow)))
    limits = final_loss_window(shown)
    if limits:
        ax.set_ylim(*limits)
    ax.set_xlim(0, max((float(c.x[-1]) for c in shown if len(c)), default=1.0))
    draw_stages(ax, comparison, axis, scale)
    label_ends(ax, [end for end in ends if len(end[0])])
    _magnify_end(ax, comparison, narrow)
    ax.set_xlabel(title)
    ax.set_ylabel("Loss (nats per token)")


def _magnify_end(ax: Axes, comparison: Comparison, narrow: bool) -> None:
    """The last 40% again, larger, in the corner that a falling curve leaves empty."""
    low, high = 0.6 * ax.get_xlim()[1], ax.get_xlim()[1]
    wanted = (_VALIDATION, _TRAINING) if comparison.single else (_VALIDATION,)
    lines = [line for line in ax.lines if line.get_zorder() in wanted]
    parts = [(line, np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for line in lines]
    late = [y[(x >= low) & (x <= high)] for _, x, y in parts if len(x) > 2]
    late = [y for y in late if len(y)]
    if not late or np.ptp(np.concatenate(late)) == 0 or not _corner_is_empty(ax):
        return
    bottom, top = min(y.min() for y in late), max(y.max() for y in late)
    inset = ax.inset_axes(_CORNER, facecolor=palette.PAPER, zorder=6)
    inset.set_in_layout(False)
    for line, x, y in parts:
        inset.plot(
            x,
            y,
            color=line.get_color(),
            linewidth=line.get_linewidth() * 0.9,
            marker=line.get_marker(),
            markersize=line.get_markersize(),
        )
    room = 0.05 * (top - bottom)
    inset.set(xlim=(low, high), ylim=(bottom - room, top + room))
    inset.locator_params(nbins=3 if narrow else 5)
    inset.tick_params(labelsize=6 if narrow else 7)
    inset.spines[:].set_visible(True)
    inset.spines[:].set_color(palette.GRID)
    inset.set_title("the end, larger", fontsize=6 if narrow else 7.5, loc="right", color=palette.MUTED, pad=-9, x=0.98)


def _corner_is_empty(ax: Axes) -> bool:
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    highest = bottom + (_CORNER[1] - 0.08) * (top - bottom)
    lines = [
        (np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float))
        for line in ax.lines
        if line.get_zorder() in (_TRAINING, _GREY, _VALIDATION)
    ]
    return all((y[x >= left + (_CORNER[0] - 0.06) * (right - left)] <= highest).all() for x, y in lines)


def _draw_run(ax: Axes, comparison: Comparison, arm: Arm, train: Curve, val: Curve) -> None:
    colour = palette.series(arm.rank)
    most_points = min(500, max(100, 3000 // len(comparison.runs)))
    train, thin_val = train.thinned(most_points), val.thinned(most_points)
    if comparison.single:
        ax.plot(train.x, train.y, color=palette.SERIES[1], linewidth=1.1, zorder=_TRAINING)
    elif arm.coloured:
        ax.plot(train.x, train.y, color=colour, linewidth=0.7, alpha=0.35, zorder=_TRAINING)
    many = len(thin_val) > _MOST_MARKERS
    width = 0.8 if not arm.coloured else 1.8 if len(arm.runs) == 1 else 1.2
    ax.plot(
        thin_val.x,
        thin_val.y,
        color=colour,
        linewidth=width,
        solid_capstyle="round",
        zorder=_VALIDATION if arm.coloured else _GREY,
        marker="" if many or not arm.coloured else "o",
        markersize=3.2 if len(arm.runs) == 1 else 2.4,
    )


def draw_savings(ax: Axes, comparison: Comparison, axis: Axis, narrow: bool = False) -> None:
    """FLOPs saved so far: the whole model (solid) and the transformer blocks alone, as the paper counts (dashed)."""
    scale, title = axis.unit(comparison.runs)
    ends: list[tuple[Curve, str, str]] = []
    for arm in reversed(comparison.arms):
        run = arm.runs[0]
        for index, (key, dash) in enumerate(_BOTH_ACCOUNTINGS):
            saved = _scaled(curve(run, axis, key), scale)
            saved = Curve(saved.x, 100 * saved.y)
            colour = palette.SERIES[index] if comparison.single else palette.series(arm.rank)
            thin = saved.thinned()
            ax.plot(thin.x, thin.y, color=colour, linestyle=dash, linewidth=1.6 if arm.coloured else 0.8, zorder=3)
            if comparison.single:
                value = f"{saved.y[-1]:.1f}%" if len(saved) else ""
                ends.append((saved, colour, f"{('whole model', 'blocks alone')[index]} {value}"))
            elif index == 0 and arm.coloured:
                ends.append((saved, colour, arm.letter))
    ends = [end for end in ends if len(end[0])]
    ax.set_xlim(0, max((float(c.x[-1]) for c, _, _ in ends), default=1.0))
    ax.set_ylim(
        0, max(1.0, 1.08 * max((line.get_ydata().max() for line in ax.lines if len(line.get_ydata())), default=1.0))
    )
    draw_stages(ax, comparison, axis, scale)
    label_ends(ax, ends)
    ax.set_xlabel(title)
    ax.set_ylabel("FLOPs saved so far (%)")


def label_ends(ax: Axes, ends: list[tuple[Curve, str, str]]) -> None:
    """Names curves in the right margin at the height where they end, moved apart where they would touch."""
    if not ends:
        return
    low, high = ax.get_ylim()
    height = ax.figure.get_size_inches()[1] * 72 * ax.get_subplotspec().get_position(ax.figure).height
    gap = 10.5 / max(height, 60.0)
    ends = sorted(ends, key=lambda end: end[0].y[-1])
    wanted = np.clip([(end[0].y[-1] - low) / (high - low) for end in ends], 0, 1)
    for (line, colour, label), at in zip(ends, spread_apart(wanted, gap), strict=True):
        right = ax.get_xlim()[1]
        if line.x[-1] < 0.985 * right:
            ax.plot([line.x[-1], right], [line.y[-1]] * 2, color=colour, linewidth=0.7, linestyle=":", zorder=1)
        y = (np.clip(line.y[-1], low, high) - low) / (high - low)
        ax.plot([1.0, 1.022], [y, at], color=colour, linewidth=1.2, transform=ax.transAxes, clip_on=False, zorder=5)
        ax.annotate(
            label,
            (1.03, at),
            xycoords="axes fraction",
            va="center",
            ha="left",
            fontsize=8.5,
            color=palette.INK,
            annotation_clip=False,
        )


def spread_apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Ascending heights in [0, 1] at least `gap` apart (where there is room), close to the ascending `wanted`."""
    at = np.array(wanted, dtype=float)
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    over = at[-1] - 1.0
    if over > 0:
        at[-1] = 1.0
        for i in range(len(at) - 2, -1, -1):
            at[i] = min(at[i], at[i + 1] - gap)
    return at


def _label(arm: Arm, narrow: bool) -> str:
    if narrow:
        return arm.letter
    seeds = f" (n={len(arm.runs)})" if len(arm.runs) > 1 else ""
    return f"{arm.letter}\u2002{arm.label}{seeds}\u2002{format_loss(arm.mean('val_loss'))}"


def _scaled(line: Curve, scale: float) -> Curve:
    return Curve(line.x / scale, line.y)
