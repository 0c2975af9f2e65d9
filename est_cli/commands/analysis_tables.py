"""The tables of est-analyze, for a terminal of 80 columns."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_MISSING = "–"
_WITHOUT_CHECKPOINT = (
    f"{_MISSING}: no checkpoint was kept there; checkpoint.at_boundaries=true keeps one at the end of every stage"
)


def print_analysis(runs: Sequence[dict[str, Any]], console: Console) -> None:
    """One table a question; a row for each run and what it has of it, or a column for each run."""
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
                values = (found["mean"], found["std"], found["quantiles"]["0.05"], found["quantiles"]["0.95"])
                table.add_row(*name, "", "", rates_text(found["rates"]), *(f"{value:.3f}" for value in values))
            table.add_section()
    return table


def rates_text(rates: dict[str, float]) -> str:
    """What is not kept whole: `heads 0.5, mlp 0.5`."""
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate != 1)


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
    """With a column for the run's name where there are several."""
    table = Table(*(["run"] if named else []), *texts, title=title, title_justify="left")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table
