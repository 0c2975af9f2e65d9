"""Heat strips of how often every layer, head and neuron block was trained."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from est_cli.reports import palette
from est_cli.reports.coverage import Coverage

_MOST_NUMBERED_CELLS = 64


def coverage_height(found: Coverage) -> float:
    """Inches that the figure needs."""
    return float(np.clip(1.3 + 0.2 * len(found.layers), 2.2, 5.5))


def draw_coverage(figure: Figure, found: Coverage) -> None:
    """Three strips that share the layers as rows; colour runs from never (0%) to every step (100%)."""
    heads_share = float(np.clip(found.heads.shape[1] / 12, 1.2, 2.4))
    layers_ax, heads_ax, blocks_ax = figure.subplots(1, 3, sharey=True, width_ratios=[0.5, heads_share, 3.4])
    _draw_strip(layers_ax, found.layers[:, None], "Layer")
    _draw_strip(heads_ax, found.heads, "Heads")
    per_block = f", {found.neurons_per_block} a block" if found.neurons_per_block > 1 else ""
    drawn = _draw_strip(blocks_ax, found.blocks, f"MLP neurons{per_block}")
    layers_ax.set_xticks([])
    layers_ax.set_ylabel("Layer")
    layers_ax.set_yticks(_ticks(len(found.layers)))
    heads_ax.set_xticks(_ticks(found.heads.shape[1]))
    heads_ax.set_xlabel("Head")
    blocks_ax.set_xticks(_ticks(found.blocks.shape[1]))
    blocks_ax.set_xlabel("Block")
    bar = figure.colorbar(drawn, ax=[layers_ax, heads_ax, blocks_ax], fraction=0.025, pad=0.015)
    bar.set_ticks([0, 50, 100], labels=["0%", "50%", "100%"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _draw_strip(ax: Axes, shares: np.ndarray, title: str):
    drawn = ax.imshow(
        100 * shares, vmin=0, vmax=100, cmap=matplotlib.colormaps[palette.HEAT_MAP], aspect="auto", interpolation="none"
    )
    if shares.size <= _MOST_NUMBERED_CELLS and shares.shape[1] <= 12 and len(shares) <= 16:
        for (row, column), share in np.ndenumerate(shares):
            colour = palette.text_on(drawn.cmap(drawn.norm(100 * share)))
            ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    ax.set_title(f"{title}\n{span(shares)}", fontsize=8.5, loc="left", color=palette.INK)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return drawn


def span(shares: np.ndarray) -> str:
    """`58–61%`, the least and the most often trained."""
    low, high = f"{100 * shares.min():.0f}", f"{100 * shares.max():.0f}"
    return f"{low}%" if low == high else f"{low}–{high}%"


def _ticks(n: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if n / step <= 12)
    return list(range(0, n, step))
