"""Final validation loss over two swept keys, as a heat map."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from est_cli.reports import palette
from est_cli.reports.arms import Comparison
from est_cli.units import format_setting

_LONGEST_VALUE = 24


def sweep_grid(comparison: Comparison, pair: tuple[str, str]) -> tuple[list[Any], list[Any], np.ndarray, np.ndarray]:
    """Row values, column values, and [rows, columns] of mean final validation loss (NaN: none yet) and of runs."""
    rows, columns = (_ordered(comparison.differing[key].values) for key in pair)
    by_row, by_column = (comparison.differing[key].values for key in pair)
    total, n = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), dtype=int)
    for index, run in enumerate(comparison.runs):
        loss = run.outcome["val_loss"]
        if np.isfinite(loss):
            cell = (rows.index(by_row[index]), columns.index(by_column[index]))
            total[cell] += loss
            n[cell] += 1
    with np.errstate(invalid="ignore"):
        return rows, columns, total / n, n


def draw_sweep(ax: Axes, comparison: Comparison, pair: tuple[str, str]) -> None:
    """Lower is better and brighter; the best cell is framed."""
    rows, columns, loss, n = sweep_grid(comparison, pair)
    drawn = ax.imshow(loss, cmap=matplotlib.colormaps[palette.HEAT_MAP].reversed(), aspect="auto", interpolation="none")
    ax.set_xticks(range(len(columns)), [_shown(value) for value in columns])
    ax.set_yticks(range(len(rows)), [_shown(value) for value in rows])
    ax.set_ylabel(pair[0])
    ax.set_xlabel(pair[1])
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(loss):
        known = np.isfinite(value)
        text = f"{value:.3f}" + (f"\nn={n[row, column]}" if n.max() > 1 else "") if known else "no result"
        colour = palette.text_on(drawn.cmap(drawn.norm(value))) if known else palette.MUTED
        ax.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)
    if np.isfinite(loss).any():
        row, column = np.unravel_index(np.nanargmin(loss), loss.shape)
        ax.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5),
                1,
                1,
                fill=False,
                edgecolor=palette.INK,
                linewidth=2.2,
                clip_on=False,
                zorder=5,
            )
        )


def _shown(value: Any) -> str:
    text = format_setting(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _ordered(values: Sequence[Any]) -> list[Any]:
    distinct = list({repr(value): value for value in values}.values())
    numeric = all(isinstance(value, int | float) for value in distinct)
    return sorted(distinct) if numeric else sorted(distinct, key=lambda value: (value is not None, str(value)))
