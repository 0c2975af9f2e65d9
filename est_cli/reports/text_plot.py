"""Curves in a terminal: braille dots where its encoding has them, letters where not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from est_cli.reports.curves import Curve

_BRAILLE = 0x2800
# Bits of the eight dots of a braille cell, [row, column].
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


@dataclass(frozen=True)
class TextCurve:
    letter: str
    colour: str
    """A rich colour."""
    curve: Curve


def text_plot(
    curves: Sequence[TextCurve],
    width: int,
    height: int,
    limits: tuple[float, float],
    x_title: str,
    braille: bool = True,
) -> Text:
    """Lines of `width` cells: `height` rows of curves with loss labels, then the horizontal axis.

    Later curves are drawn over earlier ones. `limits` are the lowest and the highest value shown.
    """
    low, high = limits
    gutter = max(len(_label(low)), len(_label(high))) + 1
    columns = max(8, width - gutter - 1)
    right = max((float(c.curve.x[-1]) for c in curves if len(c.curve)), default=1.0) or 1.0
    cells, colours = _blank(height, columns)
    for curve in curves:
        _draw(curve, cells, colours, right, low, high, braille)
    text = Text(no_wrap=True, overflow="crop")
    for row in range(height):
        value = high - (high - low) * row / max(1, height - 1)
        labelled = row in (0, height // 2, height - 1)
        text.append(f"{_label(value) if labelled else '':>{gutter}}", "dim")
        text.append("┤" if labelled and braille else "│" if braille else "|", "dim")
        for cell, colour in zip(cells[row], colours[row], strict=True):
            text.append(str(cell), str(colour))
        text.append("\n")
    text.append(_axis(gutter, columns, right, x_title, braille), "dim")
    return text


def _blank(height: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((height, columns), " ", dtype="<U1"), np.full((height, columns), "", dtype=object)


def _draw(
    curve: TextCurve, cells: np.ndarray, colours: np.ndarray, right: float, low: float, high: float, braille: bool
) -> None:
    height, columns = cells.shape
    fine_rows, fine_columns = (4, 2) if braille else (1, 1)
    x, y = _resampled(curve.curve, right, columns * fine_columns)
    rows = (high - y) / (high - low) * (height * fine_rows - 1)
    shown = (rows >= -0.5) & (rows <= height * fine_rows - 0.5)
    dots = np.zeros((height, columns), dtype=int)
    for at, row in zip(x[shown], rows[shown].round().astype(int), strict=True):
        dots[row // fine_rows, at // fine_columns] |= _DOTS[row % fine_rows, at % fine_columns] if braille else 1
    for row, column in zip(*np.nonzero(dots), strict=True):
        mark = curve.letter
        if braille:
            same = colours[row, column] == curve.colour and cells[row, column] != " "
            mark = chr(_BRAILLE | dots[row, column] | (ord(cells[row, column]) & 0xFF if same else 0))
        cells[row, column], colours[row, column] = mark, curve.colour


def _resampled(curve: Curve, right: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve's height at every fine column between its first and its last point."""
    if not len(curve):
        return np.array([], dtype=int), np.array([])
    first, last = (int(np.clip(round(x / right * (n - 1)), 0, n - 1)) for x in (curve.x[0], curve.x[-1]))
    at = np.arange(first, last + 1)
    return at, np.interp(at / max(1, n - 1) * right, curve.x, curve.y)


def _axis(gutter: int, columns: int, right: float, title: str, braille: bool) -> str:
    end = f"{right:.4g}"
    room = columns - len(end) - 1
    middle = title if len(title) + 2 <= room else ""
    corner, line = ("└", "─") if braille else ("+", "-")
    return " " * gutter + corner + line * columns + "\n" + " " * gutter + " 0" + f"{middle:^{room - 1}}" + end + "\n"


def _label(value: float) -> str:
    return f"{value:.2f}"
