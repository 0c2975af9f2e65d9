"""The numbers under the page's pointer, as JSON for its script."""

import json
from typing import Any

import numpy as np

from est_cli.reports.arms import Comparison
from est_cli.reports.axes import AXES, known_axes
from est_cli.reports.curves import train_curve
from est_cli.reports.records import RunRecord

_MAX_ROWS_IN_ALL = 8000
_MAX_ROWS = 400


def hover_json(comparison: Comparison) -> str:
    """Arms with their runs' columns, safe inside a `<script>` element."""
    arms = [arm for arm in comparison.arms if arm.coloured]
    n_runs = sum(len(arm.runs) for arm in arms)
    rows = min(_MAX_ROWS, max(40, _MAX_ROWS_IN_ALL // max(1, n_runs)))
    axes = {axis.key: axis.unit(comparison.runs)[0] for axis in known_axes(comparison)}
    data = {
        "scale": axes,
        "single": comparison.single,
        "arms": [
            {
                "letter": arm.letter,
                "label": arm.label,
                "series": arm.rank,
                "runs": [_columns(run, rows) for run in arm.runs if run.n_rows],
            }
            for arm in arms
        ],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _columns(run: RunRecord, rows: int) -> dict[str, list[float | None]]:
    chosen = np.unique(np.linspace(0, run.n_rows - 1, min(rows, run.n_rows)).round().astype(int))
    train = train_curve(run, AXES[0])
    smooth = np.interp(run.column("step") + 1, train.x, train.y) if len(train) else run.column("train/loss")
    columns = {axis.key: axis.values(run) for axis in AXES}
    columns |= {
        "train": smooth,
        "val": _carried_forward(run.column("val/loss")),
        "stage": run.column("stage"),
        "saved": run.column("flops/saved"),
        "blocks": run.column("flops/saved_blocks"),
    }
    return {key: [_short(value) for value in values[chosen]] for key, values in columns.items()}


def _carried_forward(values: np.ndarray) -> np.ndarray:
    known = np.where(np.isfinite(values), np.arange(len(values)), -1)
    last = np.maximum.accumulate(known)
    return np.where(last >= 0, values[last], np.nan)


def _short(value: Any) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
