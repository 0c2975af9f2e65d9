"""est-report: one or many runs → an HTML page, PNG figures and CSV tables, or a report in the terminal."""

import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from est_cli import reports
from est_cli.commands.entry import read_only
from est_cli.errors import UserError
from est_cli.schema import read

_FORMATS = Literal["text", "terminal", "json"]


def main() -> None:
    read_only("report", run)


def run(plain: dict[str, Any]) -> None:
    """Write the report of `runs=`; raises UserError for bad input."""
    problems: list[str] = []
    runs = read(str | tuple[str, ...] | None, plain["runs"], "runs", problems)
    out = read(str | None, plain["out"], "out", problems)
    kind = read(_FORMATS, plain["format"], "format", problems)
    if not runs and not problems:
        problems.append("runs: is missing; must be a run or sweep folder, or a list of them")
    if problems:
        raise UserError(*problems)
    folders = [Path(folder).expanduser() for folder in ([runs] if isinstance(runs, str) else runs)]
    records = reports.records.load_runs(folders)
    if kind == "terminal":
        reports.terminal.terminal_report(records, Console())
        return
    destination = Path(out).expanduser() if out else _default_out(folders)
    try:
        files = reports.report.write_report(records, destination)
    except OSError as error:
        raise UserError(f"out={destination}: cannot be written ({error.strerror})") from error
    if kind == "json":
        print(json.dumps({name: str(path) for name, path in files.items()}))
        return
    for name, path in files.items():
        Console().print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)


def _default_out(folders: list[Path]) -> Path:
    """Beside the run where there is one; here where there are several."""
    return folders[0] / "report" if len(folders) == 1 else Path("report")
