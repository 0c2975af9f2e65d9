"""Colours by role, for paper and for a dark browser: Okabe and Ito's palette, told apart by colour-blind people.

Figures are drawn in the light colours; in the page each of them becomes a CSS variable, so every colour stands for
one role only.
"""

from collections.abc import Sequence

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SERIES_DARK = ("#56b4e9", "#e8762b", "#00b386", "#d98fb8", "#e69f00", "#f0e442", "#fefefe")

INK, MUTED, GRID, REST, BAND, PAPER, TINT = (
    "#1b1f24",
    "#5b646d",
    "#e1e5e9",
    "#b3bac2",
    "#93a5b8",
    "#ffffff",
    "#f5f7f9",
)
_DARK = {
    INK: "#e7eaee",
    MUTED: "#a0a9b3",
    GRID: "#30373f",
    REST: "#59626c",
    BAND: "#5d7186",
    PAPER: "#14181d",
    TINT: "#1c2229",
    **dict(zip(SERIES, _SERIES_DARK, strict=True)),
}
_ROLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    REST: "rest",
    BAND: "band",
    PAPER: "paper",
    TINT: "tint",
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}

ON_LIGHT, ON_DARK = "#0b0b0b", "#fdfdfd"
"""Text on a heat map's cells, the same in both themes."""
HEAT_MAP = "viridis"


def text_on(rgba: Sequence[float]) -> str:
    """Black or white, whichever is read better on that colour."""
    luminance = 0.2126 * rgba[0] + 0.7152 * rgba[1] + 0.0722 * rgba[2]
    return ON_LIGHT if luminance > 0.5 else ON_DARK


def series(rank: int) -> str:
    """The colour of the arm of that rank."""
    return SERIES[rank] if rank < len(SERIES) else REST


def css_variable(rank: int) -> str:
    return f"var(--{_ROLES[series(rank)]})"


def as_css_variables(svg: str) -> str:
    """The drawing with every colour of a role replaced by its CSS variable."""
    for colour, role in _ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg


def css_rules() -> str:
    """The variables' values for light, dark and print."""
    light = "".join(f"--{role}:{colour};" for colour, role in _ROLES.items())
    dark = "".join(f"--{role}:{_DARK[colour]};" for colour, role in _ROLES.items())
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
