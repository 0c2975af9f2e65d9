"""docs/study.md: prose by hand, and every number between markers, rebuilt from the records."""

import re
from pathlib import Path

from study.figures import draw
from study.records import Records
from study.tables import TABLES

_SECTION = re.compile(r"<!-- begin: (?P<name>.+?) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)


def rebuilt(text: str, records: Records) -> str:
    """`text` with what stands between its markers made anew; KeyError for a marker that names no table."""

    def section(match: re.Match) -> str:
        name = match["name"]
        return f"<!-- begin: {name} -->\n{TABLES[name](records)}\n<!-- end: {name} -->"

    return _SECTION.sub(section, text)


def rebuild(document: Path, records: Records) -> list[Path]:
    """Write the document and its figures, in the folder `study` beside it; returns what was written."""
    document.write_text(rebuilt(document.read_text("utf-8"), records), "utf-8")
    return [document, *draw(records, document.parent / "study")]
