"""`metrics.jsonl` → numpy columns, a million lines in about a second.

Parsing every line of a long run as JSON would take several times as long as drawing the whole report, and no figure
shows more than some thousands of points. So an even selection of the lines is parsed, and every line with a
validation loss.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

MAX_PARSED_LINES = 20_000
_CHUNK_BYTES = 1 << 24
_SLOW_STEP = 3.0
"""A step that took this many times its stage's median (compilation, say) stands for itself alone."""


def read_metrics(path: Path, max_lines: int = MAX_PARSED_LINES) -> tuple[dict[str, np.ndarray], int]:
    """The columns of a metrics file and the number of its lines.

    Every column is float64 [rows], NaN where a row has no number for it. `seconds`, training time so far from
    `perf/step_s`, is added. Lines that are not JSON objects with a `step` (a last line half written, say) are
    skipped, and so are lines whose steps are logged again further down.
    """
    # Odd, so that the selection does not keep step with what happens every ten or hundred steps.
    stride = -(-_count_lines(path) // max_lines) | 1
    rows: list[dict[str, Any]] = []
    n_lines, last_parsed, before_last, last = 0, -1, b"", b""
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if index % stride == 0 or (b'"val/loss": null' not in line and b'"val/loss"' in line):
                _append_row(rows, line)
                last_parsed = index
            before_last, last, n_lines = last, line, index + 1
    if last_parsed < n_lines - 1 and not _append_row(rows, last):
        _append_row(rows, before_last)
    columns = _columns(_without_rewritten(rows))
    if "perf/step_s" in columns:
        columns["seconds"] = training_seconds(columns)
    return columns, n_lines


def training_seconds(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Seconds of training up to each row, where a row stands for all steps since the one before it. [rows]"""
    step_s = np.nan_to_num(columns["perf/step_s"])
    stage = columns.get("stage", np.zeros_like(step_s))
    usual = np.empty_like(step_s)
    for number in np.unique(stage[~np.isnan(stage)]):
        usual[stage == number] = np.median(step_s[stage == number])
    usual[np.isnan(stage)] = np.median(step_s)
    steps_since = np.diff(columns["step"], prepend=-1.0)
    return np.cumsum(step_s + (steps_since - 1) * np.minimum(step_s, _SLOW_STEP * usual))


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))


def _append_row(rows: list[dict[str, Any]], line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not isinstance(row, dict) or not _is_number(row.get("step")):
        return False
    rows.append(row)
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without_rewritten(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not rows:
        return rows
    steps = np.array([row["step"] for row in rows])
    smallest_later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
    return [row for row, kept in zip(rows, steps < smallest_later, strict=True) if kept]


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    return {
        key: np.array([row[key] if _is_number(row.get(key)) else np.nan for row in rows], dtype=np.float64)
        for key in keys
    }
