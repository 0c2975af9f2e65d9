"""The look of all figures: colours by role, matplotlib's settings, and how a figure becomes PNG or inline SVG.

The colours are Okabe and Ito's palette, which colour-blind people can tell apart. Figures are drawn in the light
colours. In the page each colour becomes a CSS variable with a light and a dark value, so every colour stands for one
role only.
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SERIES_DARK = ("#56b4e9", "#e8762b", "#00b386", "#d98fb8", "#e69f00", "#f0e442", "#fefefe")
INK, MUTED, GRID, REST, BAND = "#1b1f24", "#5b646d", "#e1e5e9", "#b3bac2", "#93a5b8"
PAPER, TINT = "#ffffff", "#f5f7f9"
_ROLES = {
    "ink": (INK, "#e7eaee"),
    "muted": (MUTED, "#a0a9b3"),
    "grid": (GRID, "#30373f"),
    "rest": (REST, "#59626c"),
    "band": (BAND, "#5d7186"),
    "paper": (PAPER, "#14181d"),
    "tint": (TINT, "#1c2229"),
    **{f"series-{i}": pair for i, pair in enumerate(zip(SERIES, _SERIES_DARK, strict=True))},
}
"""The light and the dark colour of each role."""
HEAT_MAP = "viridis"
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
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "est",
    "path.simplify": True,
}


@contextmanager
def report_style() -> Iterator[None]:
    """Figures made and saved inside look the same with any matplotlibrc of the user."""
    with matplotlib.rc_context():
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


def text_on(rgba: Sequence[float]) -> str:
    """Black or white for text on a heat map's cell, whichever is easier to read; the same in both themes."""
    luminance = 0.2126 * rgba[0] + 0.7152 * rgba[1] + 0.0722 * rgba[2]
    return "#0b0b0b" if luminance > 0.5 else "#fdfdfd"


def bare(ax: Axes) -> None:
    """Axes without grid, ticks and frame, for heat maps."""
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def laid_out(figure: Figure) -> Figure:
    """The figure with its axes in their final place, so that not every file it is saved to computes it again."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """On white, sharp enough for print."""
    figure.savefig(path, dpi=150, facecolor="white", pil_kwargs={"compress_level": 3})


def inline_svg(figure: Figure, ident: str, description: str, css_class: str, data: dict[str, str]) -> str:
    """The figure's `<svg>` element for the page, with ids that start with `ident` and `data` as data attributes.

    `data-frame` is the first axes' box (left, top, width, height) in the drawing's units and `data-range` its limits
    (x low, x high, y low, y high), so the page's script can find the value under the pointer.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :].strip(), flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening).group()
    rest = re.sub(r'\bid="', f'id="{ident}-', rest)
    rest = re.sub(r'href="#', f'href="#{ident}-', rest).replace("url(#", f"url(#{ident}-")
    for role, (colour, _) in _ROLES.items():
        rest = rest.replace(colour, f"var(--{role})")

    inches = figure.get_size_inches()
    width, height = inches * 72
    ax = figure.axes[0]
    box = ax.get_position()
    frame = (box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height)
    data = data | {
        "frame": " ".join(f"{value:.2f}" for value in frame),
        "range": " ".join(f"{value:.8g}" for value in (*ax.get_xlim(), *ax.get_ylim())),
    }
    attributes = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in data.items())
    # A little larger than drawn: 8.5 points become about 12 pixels.
    return (
        f'<svg {attributes} {view_box} class="plot {css_class}" role="img" aria-label="{html.escape(description)}"'
        f' style="max-width:{round(inches[0] * 104)}px">{rest}'
    )
