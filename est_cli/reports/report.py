"""Runs → an HTML page, PNG figures and CSV tables in one folder.

matplotlib and Jinja2 take most of a second to import, so they are imported only when something is drawn.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from est_cli import reports
from est_cli.reports.comparison import Arm, Comparison
from est_cli.reports.coverage import coverage
from est_cli.reports.records import RunRecord, evenly, load_runs

_MAIN_FILES = {"html": "report.html", "png": "report.png", "csv": "runs.csv"}
FORMATS = tuple(_MAIN_FILES)
_MAX_CURVE_ROWS = 2000
_CURVE_KEYS = ("step", "stage", "tokens", "seconds", "flops/total", "train/loss", "val/loss")
_CURVE_KEYS += ("flops/saved", "flops/saved_blocks", "train/loss_smoothed")


def write_report(runs: Sequence[RunRecord], out: Path, formats: Sequence[str] = FORMATS) -> dict[str, Path]:
    """Writes report.html, report.png with figures/*.png, and runs.csv with curves.csv into `out`.

    Returns the main file of every format. All file names are fixed, so no run's name can lead out of `out`.
    Raises OSError if `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(runs)
    files = {name: out / file for name, file in _MAIN_FILES.items() if name in formats}
    if "csv" in files:
        _write_csv(files["csv"], _run_rows(comparison))
        _write_csv(out / "curves.csv", [row for run in runs for row in _curve_rows(run)])
    if "html" in files or "png" in files:
        with reports.style.report_style():
            _draw(comparison, out, files)
    return files


def try_report(folders: Sequence[Path], out: Path, formats: Sequence[str] = FORMATS) -> dict[str, Path] | str:
    """The files of `write_report`, or in words why there are none: a finished run must not fail by its report."""
    try:
        return write_report(load_runs(folders), out, formats)
    except Exception as error:
        return f"not written: {type(error).__name__}: {error}"


def write_compute_and_time(runs: Sequence[RunRecord], path: Path) -> Path:
    """Writes one PNG: loss against whole-model FLOPs, and against time."""
    with reports.style.report_style():
        reports.style.save_png(reports.figures.compute_and_time(Comparison(runs)), path)
    return path


def _draw(comparison: Comparison, out: Path, files: dict[str, Path]) -> None:
    ranked = [run for arm in comparison.arms for run in arm.runs]
    samples = (run for run in ranked if not all(stage.is_full for stage in run.stages))
    found = coverage(next(samples, ranked[0]))
    drawings = reports.figures.drawings(comparison, found)
    if "html" in files:
        files["html"].write_text(reports.page.page(comparison, drawings, found), encoding="utf-8", errors="replace")
    if "png" in files:
        (out / "figures").mkdir(exist_ok=True)
        for drawing in drawings:
            reports.style.save_png(drawing.figure, out / "figures" / f"{drawing.name}.png")
        reports.style.save_png(reports.figures.overview(comparison), files["png"])


def _run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Name, folder, status, the settings that differ, summary.json's numbers, and the step time of every stage."""
    n_stages = max((stage.number for run in comparison.runs for stage in run.stages), default=0)
    letters = {run: arm.letter for arm in comparison.arms for run in arm.runs}
    rows = []
    for run in comparison.runs:
        medians = {entry.stage.number: entry.median for entry in Arm(0, run.name, (run,)).stage_times}
        rows.append(
            {"arm": letters[run], "run": run.name, "folder": str(run.folder), "status": run.status}
            | {key: difference.values[run] for key, difference in comparison.differing.items()}
            | {name: _cell(value) for name, value in run.outcome.items()}
            | {f"stage{n}_step_s_median": _cell(medians.get(n, math.nan)) for n in range(1, n_stages + 1)}
        )
    return rows


def _curve_rows(run: RunRecord) -> list[dict[str, Any]]:
    """At most 2000 rows, evenly taken, and every validation loss."""
    chosen = np.union1d(evenly(run.n_rows, _MAX_CURVE_ROWS), np.flatnonzero(np.isfinite(run.column("val/loss"))))
    columns = {key.replace("/", "_"): run.column(key)[chosen] for key in _CURVE_KEYS}
    return [
        {"run": run.name} | {name: _cell(values[i]) for name, values in columns.items()} for i in range(len(chosen))
    ]


def _cell(value: float) -> Any:
    if not math.isfinite(value):
        return ""
    return int(value) if float(value).is_integer() and abs(value) < 2**63 else float(value)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
