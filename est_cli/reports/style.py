"""The look of all figures: colours by role, matplotlib's settings, shapes that several figures have, PNG and SVG.

The colours are Okabe and Ito's palette, which colour-blind people can tell apart. Figures are drawn in the light
colours. In the page each colour becomes a CSS variable with a light and a dark value, so every colour stands for one
role only.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

_ROLES = {
    "ink": ("#1b1f24", "#e7eaee"),
    "muted": ("#5b646d", "#a0a9b3"),
    "grid": ("#e1e5e9", "#30373f"),
    "rest": ("#b3bac2", "#59626c"),
    "band": ("#93a5b8", "#5d7186"),
    "paper": ("#ffffff", "#14181d"),
    "tint": ("#f5f7f9", "#1c2229"),
}
"""The light and the dark colour of each role."""
INK, MUTED, GRID, REST, BAND, PAPER, _ = (light for light, _ in _ROLES.values())
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SERIES_DARK = ("#56b4e9", "#e8762b", "#00b386", "#d98fb8", "#e69f00", "#f0e442", "#fefefe")
_ROLES |= {f"series-{i}": pair for i, pair in enumerate(zip(SERIES, _SERIES_DARK, strict=True))}
WIDE = 9.2
"""Inches of a figure that fills the page."""

_SETTINGS = {
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    # A dollar sign in a run's name is not mathematics.
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "est",
}


@contextmanager
def report_style() -> Iterator[None]:
    """Figures made and saved inside look the same with any matplotlibrc of the user.

    Warnings about letters that the font lacks are left out: the page shows them correctly.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def series(rank: int) -> str:
    """The colour of the arm of that rank."""
    return SERIES[rank] if rank < len(SERIES) else REST


def css_variable(rank: int) -> str:
    return f"var(--series-{rank})" if rank < len(SERIES) else "var(--rest)"


def css_rules() -> str:
    """The variables' values for light, dark and print."""
    light, dark = ("".join(f"--{role}:{pair[i]};" for role, pair in _ROLES.items()) for i in (0, 1))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def draw_heat_map(ax: Axes, values: np.ndarray, texts: np.ndarray, fontsize: float, **look: Any) -> AxesImage:
    """`values` [rows, columns] as colours under `texts` of the same shape, or of size 0 for none."""
    drawn = ax.imshow(values, aspect="auto", interpolation="none", **look)
    for (row, column), text in np.ndenumerate(texts):
        red, green, blue, _ = drawn.to_rgba(values[row, column])
        # Black or white, whichever is easier to read; the same in both themes.
        dark_cell = 0.2126 * red + 0.7152 * green + 0.0722 * blue <= 0.5
        colour = MUTED if np.isnan(values[row, column]) else "#fdfdfd" if dark_cell else "#0b0b0b"
        ax.text(column, row, text, ha="center", va="center", fontsize=fontsize, color=colour)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return drawn


def draw_box(ax: Axes, samples: np.ndarray, y: float, colour: str) -> None:
    """A horizontal box of 25–75% with a bar at the median, and whiskers of 5–95%."""
    parts = {"showfliers": False, "showcaps": False, "patch_artist": True, "manage_ticks": False}
    parts |= {"boxprops": {"facecolor": to_rgba(colour, 0.4), "linewidth": 0}, "whiskerprops": {"color": colour}}
    parts |= {"medianprops": {"color": colour, "linewidth": 2.2}}
    ax.boxplot(samples, positions=[y], orientation="horizontal", widths=0.55, whis=(5, 95), **parts)


def _lay_out(figure: Figure) -> None:
    """Puts the axes in their final place once, however many files the figure is saved to."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")


def save_png(figure: Figure, path: Path) -> None:
    """On white, sharp enough for print."""
    _lay_out(figure)
    figure.savefig(path, dpi=150, facecolor="white", pil_kwargs={"compress_level": 3})


def inline_svg(figure: Figure, ident: str) -> tuple[dict[str, str], str]:
    """The figure for the page: the attributes of its `<svg>`, and what is inside, with ids that start with `ident`.

    `data-frame` is the first axes' box (left, top, width, height) in the drawing's units and `data-range` its limits
    (x low, x high, y low, y high), so the page's script can find the value under the pointer.
    """
    buffer = io.StringIO()
    _lay_out(figure)
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    inside = re.search(r"<svg[^>]*>(.*)</svg>", buffer.getvalue(), re.DOTALL)[1]
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL)
    inside = re.sub(r'\bid="', f'id="{ident}-', inside)
    inside = re.sub(r'href="#', f'href="#{ident}-', inside).replace("url(#", f"url(#{ident}-")
    for role, (colour, _) in _ROLES.items():
        inside = inside.replace(colour, f"var(--{role})")

    width, height = figure.get_size_inches() * 72
    ax = figure.axes[0]
    box = ax.get_position()
    frame = (box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height)
    attributes = {
        "viewBox": f"0 0 {width:g} {height:g}",
        # A little larger than drawn: 8.5 points become about 12 pixels.
        "style": f"max-width:{round(width / 72 * 104)}px",
        "data-frame": " ".join(f"{value:.2f}" for value in frame),
        "data-range": " ".join(f"{value:.8g}" for value in (*ax.get_xlim(), *ax.get_ylim())),
    }
    return attributes, inside
