"""est-analyze: stage transitions, the spread over subnetworks and the sharpness of one run or of several."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from est_cli import evaluation, reports
from est_cli.commands.entry import folders_of, read_request, results_folder, run_composed
from est_cli.commands.evaluate import short_names
from est_cli.config import CONFIG_FILE, Format
from est_cli.errors import UserError, say
from est_cli.evaluation import Measures
from est_cli.runs.directory import check_writable
from est_cli.tracking.metrics import METRICS_NAME

_JSON = "analysis.json"
_MISSING = "–"
_WITHOUT_CHECKPOINT = (
    f"{_MISSING}: no checkpoint was kept there; checkpoint.at_boundaries=true keeps one at the end of every stage"
)


@dataclass(frozen=True)
class Request(Measures):
    run: str | tuple[str, ...] | None
    out: str | None
    format: Format


def main() -> None:
    run_composed("analyze", run)


def run(composed: dict[str, Any]) -> None:
    """Measure what `run=` names, and write JSON and figures; raises UserError for bad input."""
    request = read_request(Request, composed, run="a run directory, or a list of them")
    single = isinstance(request.run, str)
    folders = folders_of(request.run)
    _check_runs(folders)
    out = results_folder(request.out, folders, "analysis")
    check_writable(out, "out")
    runs = _analyze(folders, request)
    facts = runs[0] if single else {"runs": runs}
    out.mkdir(parents=True, exist_ok=True)
    (out / _JSON).write_text(json.dumps(facts, indent=1) + "\n")
    figures = reports.analysis_figures.write_figures(runs, reports.records.load_runs(folders), out)
    if request.format == "json":
        print(json.dumps({**facts, "out": str(out), "png": [str(path) for path in figures]}))
        return
    print_analysis(runs, Console())
    for path in (out / _JSON, *figures):
        print(path)


def _check_runs(folders: Sequence[Path]) -> None:
    """Before anything is measured."""
    problems, seen = [], set()
    for folder in folders:
        if folder.resolve() in seen:
            problems.append(f"run={folder}: is named twice")
        elif (folder / CONFIG_FILE).exists() and not (folder / METRICS_NAME).exists():
            problems.append(f"run={folder}: has logged no step yet: there is no {METRICS_NAME}")
        seen.add(folder.resolve())
    if problems:
        raise UserError(*problems)


def _analyze(folders: Sequence[Path], measures: Measures) -> list[dict[str, Any]]:
    """All runs, each with the rates of all, so that full training stands beside EST."""
    configs = [evaluation.run.read_run_config(folder) for folder in folders]
    rates = evaluation.loss.partial_rates([stage for config in configs for stage in config.stages])
    found = []
    for name, folder in zip(short_names(list(map(str, folders))), folders, strict=True):
        opened = evaluation.run.open_run(folder, say)
        val = evaluation.run.run_store(opened, say).val
        found.append(
            {"run": str(folder), "name": name, **evaluation.analysis.analyze(opened, val, rates, measures, say)}
        )
    return found


def print_analysis(runs: Sequence[dict[str, Any]], console: Console) -> None:
    """Three tables: stage transitions, losses over subnetworks, sharpness."""
    transitions = [(run, entry) for run in runs for entry in run["transitions"]]
    if transitions:
        console.print(_transitions_table(transitions, len(runs) > 1))
        if any(entry["at_checkpoint"] is None for _, entry in transitions):
            console.print(_WITHOUT_CHECKPOINT, highlight=False)
    console.print(_losses_table(runs))
    console.print(_sharpness_table(runs))


def _transitions_table(found: Sequence[tuple[dict[str, Any], dict[str, Any]]], named: bool) -> Table:
    table = _table("Stage transitions", named, "transition", "loss", numbers=("before", "after", "drop"))
    for run, entry in found:
        title = f"{entry['from_stage']} → {entry['to_stage']}, step {entry['step']}"
        for number, row in enumerate(_transition_rows(entry)):
            table.add_row(
                *([run["name"]] if named else []), title if number == 0 else "", *row, end_section=number == 2
            )
    return table


def _transition_rows(entry: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "training, logged", *_change(entry["train_loss"])
    yield "subnetworks, same weights", *_change(entry["at_checkpoint"])
    pair = entry["val_loss"]
    if pair is None:
        yield "full model, logged", *(_MISSING,) * 3
        return
    before, after = pair
    cells = (f"{before['loss']:.3f}", f"{after['loss']:.3f}", f"{before['loss'] - after['loss']:.3f}")
    yield f"full model, updates {before['updates']} and {after['updates']}", *cells


def _change(losses: dict[str, float] | None) -> tuple[str, str, str]:
    if losses is None:
        return (_MISSING,) * 3
    before, after, error = losses["before"], losses["after"], losses["standard_error"]
    return f"{before:.3f}", f"{after:.3f}", f"{before - after:.3f} ± {error:.3f}"


def _losses_table(runs: Sequence[dict[str, Any]]) -> Table:
    numbers = ("loss", "std", "5%", "95%")
    title = f"Full model and sampled subnetworks, on {runs[0]['tokens']:,} validation tokens"
    table = _table(title, len(runs) > 1, "step", "stage", "model", numbers=numbers)
    for run in runs:
        name = [run["name"]] if len(runs) > 1 else []
        for entry in run["checkpoints"]:
            full = ("full", f"{entry['full_loss']:.3f}", "", "", "")
            table.add_row(*name, str(entry["step"]), str(entry["stage"]), *full)
            for found in entry["subnetworks"]:
                kept = reports.analysis_figures.rates_text(found["rates"])
                values = (found["mean"], found["std"], found["quantiles"]["0.05"], found["quantiles"]["0.95"])
                table.add_row(*name, "", "", kept, *(f"{value:.3f}" for value in values))
            table.add_section()
    return table


def _sharpness_table(runs: Sequence[dict[str, Any]]) -> Table:
    names = [run["name"] for run in runs] if len(runs) > 1 else [""]
    table = _table("Sharpness of the full model's loss", False, "", numbers=names)
    table.add_row("after updates", *(str(run["step"] + 1) for run in runs))
    table.add_row("largest eigenvalue of the Hessian", *map(_eigenvalue, runs))
    for entries in zip(*(run["perturbation"] for run in runs), strict=True):
        rises = (f"{entry['mean']:+.4f} ± {entry['std']:.4f}" for entry in entries)
        table.add_row(f"rise under noise of {entries[0]['relative_norm']:g} ‖w‖", *rises)
    return table


def _eigenvalue(run: dict[str, Any]) -> str:
    found = run["sharpness"]
    unsure = "" if found["settled"] else f" (not settled after {found['iterations']} products)"
    return f"{found['largest_eigenvalue']:.4g}{unsure}"


def _table(title: str, named: bool, *texts: str, numbers: Sequence[str]) -> Table:
    """`named`: with a column for the run's name."""
    columns = (Column(name, justify="right", overflow="fold") for name in numbers)
    return Table(*(["run"] if named else []), *texts, *columns, title=title, title_justify="left")
