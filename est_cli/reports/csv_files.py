"""The report's numbers for a spreadsheet: one row a run, and the curves."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from est_cli.reports.arms import Comparison
from est_cli.reports.axes import AXES
from est_cli.reports.curves import train_curve
from est_cli.reports.records import RunRecord
from est_cli.reports.stage_times import stage_times

_MAX_CURVE_ROWS = 2000
_CURVE_COLUMNS = {
    "step": "step",
    "stage": "stage",
    "tokens": "tokens",
    "seconds": "seconds",
    "flops_total": "flops/total",
    "train_loss": "train/loss",
    "val_loss": "val/loss",
    "flops_saved": "flops/saved",
    "flops_saved_blocks": "flops/saved_blocks",
}


def write_runs(comparison: Comparison, path: Path) -> None:
    """Name, folder, status, the settings that differ, summary.json's numbers, and the step time of every stage."""
    n_stages = max((stage.number for run in comparison.runs for stage in run.stages), default=0)
    arm_of = {id(run): arm for arm in comparison.arms for run in arm.runs}
    rows = []
    for index, run in enumerate(comparison.runs):
        arm = arm_of[id(run)]
        medians = {entry.stage.number: entry.median for entry in stage_times(type(arm)(0, run.name, (run,)))}
        rows.append(
            {"arm": arm.letter, "run": run.name, "folder": str(run.folder), "status": run.status}
            | {key: difference.values[index] for key, difference in comparison.differing.items()}
            | {name: _cell(value) for name, value in run.outcome.items()}
            | {
                f"stage{number}_step_s_median": _cell(medians.get(number, math.nan))
                for number in range(1, n_stages + 1)
            }
        )
    _write(path, rows)


def write_curves(comparison: Comparison, path: Path) -> None:
    """At most 2000 rows a run, evenly taken, and every validation loss."""
    _write(path, [row for run in comparison.runs for row in _curve_rows(run)])


def _curve_rows(run: RunRecord) -> list[dict[str, Any]]:
    if not run.n_rows:
        return []
    even = np.linspace(0, run.n_rows - 1, min(_MAX_CURVE_ROWS, run.n_rows)).round().astype(int)
    chosen = np.union1d(even, np.flatnonzero(np.isfinite(run.column("val/loss"))))
    columns = {name: run.column(key)[chosen] for name, key in _CURVE_COLUMNS.items()}
    train = train_curve(run, AXES[0])
    if len(train):
        columns["train_loss_smoothed"] = np.interp(run.column("step")[chosen] + 1, train.x, train.y)
    return [
        {"run": run.name} | {name: _cell(values[i]) for name, values in columns.items()} for i in range(len(chosen))
    ]


def _cell(value: float) -> Any:
    if not math.isfinite(value):
        return ""
    return int(value) if float(value).is_integer() and abs(value) < 2**63 else float(value)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
