"""A matplotlib figure as an inline SVG that takes its colours from the page."""

import html
import io
import re

from matplotlib.figure import Figure

from est_cli.reports import palette


def inline_svg(figure: Figure, ident: str, description: str, css_class: str = "") -> str:
    """The figure's `<svg>` element, with ids that start with `ident` and no width of its own.

    `data-frame` is the first axes' box (left, top, width, height) in the drawing's units and `data-range` its limits
    (x low, x high, y low, y high), so that the page's script can find the value under the pointer.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening).group()
    rest = re.sub(r'\bid="', f'id="{ident}-', rest)
    rest = re.sub(r'href="#', f'href="#{ident}-', rest)
    rest = rest.replace("url(#", f"url(#{ident}-")
    title = html.escape(description, quote=True)
    return (
        f'<svg {view_box} class="plot {css_class}" role="img" aria-label="{title}"'
        f' style="max-width:{_max_width(figure)}px" {_geometry(figure)}>{palette.as_css_variables(rest)}'
    )


def _max_width(figure: Figure) -> int:
    # A little larger than drawn: 8.5 points become about 12 pixels.
    return round(figure.get_size_inches()[0] * 104)


def _geometry(figure: Figure) -> str:
    width, height = figure.get_size_inches() * 72
    ax = figure.axes[0]
    box = ax.get_position()
    frame = (box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height)
    limits = (*ax.get_xlim(), *ax.get_ylim())
    return (
        f'data-frame="{" ".join(f"{value:.2f}" for value in frame)}"'
        f' data-range="{" ".join(f"{value:.8g}" for value in limits)}"'
    )
