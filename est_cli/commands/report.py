"""est-report: one or many runs → an HTML page, PNG figures and CSV tables, or a report in the terminal."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from est_cli import reports
from est_cli.commands.entry import folders_of, read_request, results_folder, run_composed
from est_cli.errors import UserError


@dataclass(frozen=True)
class Request:
    runs: str | tuple[str, ...] | None
    out: str | None
    format: Literal["text", "terminal", "json"]


def main() -> None:
    run_composed("report", run)


def run(composed: dict[str, Any]) -> None:
    """Write the report of `runs=`; raises UserError for bad input."""
    request = read_request(Request, composed, runs="a run or sweep folder, or a list of them")
    folders = folders_of(request.runs)
    records = reports.records.load_runs(folders)
    if request.format == "terminal":
        reports.terminal.terminal_report(records, Console())
        return
    out = results_folder(request.out, folders, "report")
    try:
        files = reports.report.write_report(records, out)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror})") from error
    if request.format == "json":
        print(json.dumps({name: str(path) for name, path in files.items()}))
        return
    for name, path in files.items():
        print(f"{name}: {path}")
