"""est-analyze: stage transitions, the spread over subnetworks and the sharpness of one run or of several."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from est_cli.commands.analysis_tables import print_analysis
from est_cli.commands.entry import read_only, say
from est_cli.commands.evaluate import short_names
from est_cli.commands.run_directory import CONFIG, METRICS
from est_cli.config import Format
from est_cli.errors import UserError
from est_cli.evaluation.measures import Measures
from est_cli.schema import read

_JSON = "analysis.json"


def main() -> None:
    read_only("analyze", run)


def run(plain: dict[str, Any]) -> None:
    """Measure what `run=` names, and write JSON and figures; raises UserError for bad input."""
    problems: list[str] = []
    plain = dict(plain)
    given = read(str | tuple[str, ...] | None, plain.pop("run"), "run", problems)
    out = read(str | None, plain.pop("out"), "out", problems)
    kind = read(Format, plain.pop("format"), "format", problems)
    measures = read(Measures, plain, "", problems)
    if not given and not problems:
        problems.append("run: is missing; must be a run directory, or a list of them")
    if problems:
        raise UserError(*problems)
    folders = [Path(folder).expanduser() for folder in ([given] if isinstance(given, str) else given)]
    _check_runs(folders)
    destination = Path(out).expanduser() if out else _default_out(folders)
    _check_writable(destination)
    runs = _analyze(folders, measures)
    facts = runs[0] if isinstance(given, str) else {"runs": runs}
    files = _write(facts, runs, folders, destination)
    if kind == "json":
        print(json.dumps({**facts, "out": str(destination), "png": [str(path) for path in files]}))
        return
    console = Console()
    print_analysis(runs, console)
    for path in (destination / _JSON, *files):
        console.print(path, soft_wrap=True, highlight=False, markup=False)


def _check_runs(folders: Sequence[Path]) -> None:
    """Before anything is measured."""
    problems, seen = [], set()
    for folder in folders:
        if folder.resolve() in seen:
            problems.append(f"run={folder}: is named twice")
        elif (folder / CONFIG).exists() and not (folder / METRICS).exists():
            problems.append(f"run={folder}: has logged no step yet: there is no {METRICS}")
        seen.add(folder.resolve())
    if problems:
        raise UserError(*problems)


def _default_out(folders: Sequence[Path]) -> Path:
    """Within the run where there is one; here where there are several."""
    return folders[0] / "analysis" if len(folders) == 1 else Path("analysis")


def _check_writable(out: Path) -> None:
    """Before anything is measured."""
    taken = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not taken.is_dir() or not os.access(taken, os.W_OK):
        raise UserError(f"out={out}: cannot be written; must be a folder, or the name of a new one")


def _analyze(folders: Sequence[Path], measures: Measures) -> list[dict[str, Any]]:
    """All runs, each with the rates of all, so that full training stands beside EST."""
    from est_cli.evaluation.analysis import analyze
    from est_cli.evaluation.run import open_run, read_run_config, run_store
    from est_cli.evaluation.spread import partial_rates

    configs = [read_run_config(folder) for folder in folders]
    rates = partial_rates([stage for config in configs for stage in config.stages])
    found = []
    for name, folder in zip(short_names(list(map(str, folders))), folders, strict=True):
        opened = open_run(folder, say)
        val = run_store(opened, say).val
        found.append({"run": str(folder), "name": name, **analyze(opened, val, rates, measures, say)})
    return found


def _write(facts: dict[str, Any], runs: list[dict[str, Any]], folders: Sequence[Path], out: Path) -> list[Path]:
    """The JSON, and the figures, whose paths are returned."""
    from est_cli.reports.analysis_figures import write_figures
    from est_cli.reports.records import load_runs

    out.mkdir(parents=True, exist_ok=True)
    (out / _JSON).write_text(json.dumps(facts, indent=1) + "\n")
    return write_figures(runs, load_runs(folders), out)
