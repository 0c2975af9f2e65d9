"""docs/study.md: prose by hand, and every number and figure between markers, rebuilt from the records."""

import re
from pathlib import Path

from est_cli.reports.style import report_style
from study.figures import FIGURES, drawn
from study.records import Records
from study.tables import MISSING, TABLES

_SECTION = re.compile(r"<!-- begin: (?P<name>.+?) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)
_FIGURE = "figure "


def rebuilt(text: str, records: Records) -> str:
    """`text`, with what stands between its markers rebuilt. Raises KeyError for a marker that names nothing."""
    figures = drawn(records)

    def section(match: re.Match) -> str:
        name = match["name"]
        figure = name.removeprefix(_FIGURE)
        if figure == name:
            content = TABLES[name](records)
        else:
            shows, _ = FIGURES[figure]
            content = f"![{shows}](study/{figure}.svg)" if figure in figures else f"{shows}: {MISSING}."
        return f"<!-- begin: {name} -->\n{content}\n<!-- end: {name} -->"

    return _SECTION.sub(section, text)


def rebuild(document: Path, records: Records) -> list[Path]:
    """Write the document and its figures, in the folder `study` beside it; returns what was written."""
    document.write_text(rebuilt(document.read_text("utf-8"), records), "utf-8")
    return [document, *draw(records, document.parent / "study")]


def draw(records: Records, folder: Path) -> list[Path]:
    """Write the figures that have something to show and remove the others; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = drawn(records)
    for name in FIGURES.keys() - figures:
        (folder / f"{name}.svg").unlink(missing_ok=True)
    with report_style():
        for name, figure in figures.items():
            # Without a date, so that the same records give the same bytes.
            figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})
    return [folder / f"{name}.svg" for name in figures]
