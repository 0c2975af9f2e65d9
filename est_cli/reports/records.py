"""A run read from its folder: config.yaml, metrics.jsonl and, once it has ended, summary.json.

Parsing every line of a long metrics.jsonl takes several times as long as drawing the report, and no figure shows more
than a few thousand points. So only an even selection of lines is parsed, and every line with a validation loss: a
million lines take about a second.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from est_cli.errors import UserError, nearest
from est_cli.subnet.schedule import Rates, Stage, StageSpec, build_stages

MAX_PARSED_LINES = 20_000
_CHUNK_BYTES = 1 << 24
_SLOW_STEP = 3.0
"""A step of more than this many medians of its stage (compilation, for example) does not stand for unlogged steps."""
_NOT_RUNS = {"checkpoints", "report", "wandb", ".hydra", ".git"}
_LAST_VALUES = ("val/loss", "tokens", "flops/total", "flops/full_total", "flops/saved", "flops/saved_blocks")


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder describes it."""

    name: str
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    columns: dict[str, np.ndarray]
    """float64 [rows] by key, one row for each parsed line of metrics.jsonl."""
    n_lines: int = 0
    problems: tuple[str, ...] = ()
    """What could not be read, in words."""

    def column(self, key: str) -> np.ndarray:
        """float64 [rows]; all NaN if the run never logged `key`."""
        return self.columns.get(key, np.full(self.n_rows, np.nan))

    def setting(self, key: str) -> Any:
        """The config's value under a dotted key, or None."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def n_rows(self) -> int:
        return len(self.columns.get("step", ()))

    @property
    def steps_done(self) -> int:
        return int(self.columns["step"][-1]) + 1 if self.n_rows else 0

    @property
    def status(self) -> str:
        """`done`, `stopped`, `failed`, or `unfinished` if there is neither a summary nor an error."""
        if self._summary_is_current:
            return str(self.summary.get("status", "done"))
        return "failed" if (self.folder / "error.txt").is_file() else "unfinished"

    @property
    def _summary_is_current(self) -> bool:
        # A stopped run that was continued has an old summary until it ends again.
        return self.summary is not None and (self.summary.get("steps") or 0) >= self.steps_done

    @cached_property
    def outcome(self) -> dict[str, float]:
        """The key numbers by summary.json's names, from the summary or from the last line that has them."""
        last = {key.replace("/", "_"): _last_number(self.column(key)) for key in _LAST_VALUES}
        last |= {"train_s": _last_number(self.column("seconds")), "steps": float(self.steps_done)}
        if self._summary_is_current:
            known = {name: self.summary.get(name) for name in last}
            last |= {name: float(value) for name, value in known.items() if isinstance(value, int | float)}
        return last

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The config's stages, with fractions for what has joined; those of the metrics if the config is incomplete."""
        try:
            known = {field.name for field in fields(StageSpec)}
            specs = [
                StageSpec(**{key: spec[key] for key in known & spec.keys()})
                for spec in self.config["scheduler"]["stages"]
            ]
            model = self.config["model"]
            stages = build_stages(specs, self.config["trainer"]["max_steps"])
            return tuple(replace(stage, grown=stage.grown.fractions(model)) for stage in stages)
        except (KeyError, TypeError, ValueError, AttributeError):
            return self._logged_stages()

    def _logged_stages(self) -> tuple[Stage, ...]:
        number, step = self.column("stage"), self.columns.get("step", np.array([]))
        starts = [i for i in range(self.n_rows) if number[i] == number[i] and (i == 0 or number[i] != number[i - 1])]
        ends = [*(int(step[i]) for i in starts[1:]), self.steps_done][: len(starts)]
        kept = [self.column(f"subnet/{unit}") for unit in ("heads", "mlp", "layers")]
        return tuple(
            Stage(int(number[i]), int(step[i]) if position else 0, end, Rates(*(float(k[i]) for k in kept)))
            for position, (i, end) in enumerate(zip(starts, ends, strict=True))
        )


def _last_number(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")


def load_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in `paths`, each once. A path is a run folder, which holds metrics.jsonl, or a folder of run folders.

    Raises one UserError for all paths that hold no run.
    """
    problems, found = [], {}
    for path in map(Path, paths):
        folders = _run_folders(path)
        if not folders:
            problems.append(_explain_nothing(path))
        for folder in folders:
            found.setdefault(folder.resolve(), (folder, path))
    if not paths:
        problems.append("runs=[]: must name at least one run or sweep folder")
    if problems:
        raise UserError(*problems)
    names = [folder.relative_to(root).as_posix() if folder != root else at.name for at, (folder, root) in found.items()]
    return [
        _read_run(f"{at.parent.name}/{at.name}" if names.count(name) > 1 else name, folder)
        for name, (at, (folder, _)) in zip(names, found.items(), strict=True)
    ]


def _run_folders(path: Path) -> list[Path]:
    folders = []
    for root, below, files in os.walk(path):
        if "metrics.jsonl" in files:
            folders.append(Path(root))
            below.clear()
        below[:] = sorted(name for name in below if name not in _NOT_RUNS)
    return folders


def _explain_nothing(path: Path) -> str:
    what = "a folder with metrics.jsonl in it or below it"
    if path.is_dir():
        return f"runs={path}: no metrics.jsonl there or below; must be {what}"
    parent = next((p for p in path.parents if p.is_dir()), None)
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent else []
    missing = path.relative_to(parent).parts[0] if parent else path.name
    return f"runs={path}: there is no such folder; must be {what}{nearest(missing, siblings)}"


def _read_run(name: str, folder: Path) -> RunRecord:
    problems: list[str] = []
    config = _read_mapping(folder / "config.yaml", yaml.safe_load, problems)
    summary = _read_mapping(folder / "summary.json", json.loads, problems)
    if config is None:
        problems.append(f"{name}: no config.yaml")
    columns, n_lines = read_metrics(folder / "metrics.jsonl")
    return RunRecord(name, folder, config or {}, summary, columns, n_lines, tuple(problems))


def _read_mapping(path: Path, parse: Callable[[str], Any], problems: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
    return content if isinstance(content, dict) else None


def read_metrics(path: Path, max_lines: int = MAX_PARSED_LINES) -> tuple[dict[str, np.ndarray], int]:
    """The columns of a metrics file and the number of its lines.

    Every column is float64 [rows], NaN where a row has no number for it. `seconds` is added: training time so far,
    from `perf/step_s`. Two kinds of lines are skipped: those that are not JSON objects with a `step`, such as a last
    line that was cut short, and those whose steps are logged again further down.
    """
    with path.open("rb") as file:
        n_lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))
    # Odd, so the selection does not coincide with what happens every ten or hundred steps.
    stride = -(-n_lines // max_lines) | 1
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
    rows = _without_rewritten(rows)
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    columns = {
        key: np.array([row[key] if _is_number(row.get(key)) else np.nan for row in rows], dtype=np.float64)
        for key in keys
    }
    if "perf/step_s" in columns:
        columns["seconds"] = _training_seconds(columns)
    return columns, n_lines


def _training_seconds(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Seconds of training up to each row; a row stands for all steps since the row before it. [rows]"""
    step_s = np.nan_to_num(columns["perf/step_s"])
    stage = columns.get("stage", np.zeros_like(step_s))
    usual = np.empty_like(step_s)
    for number in np.unique(stage[~np.isnan(stage)]):
        usual[stage == number] = np.median(step_s[stage == number])
    usual[np.isnan(stage)] = np.median(step_s)
    steps_since = np.diff(columns["step"], prepend=-1.0)
    return np.cumsum(step_s + (steps_since - 1) * np.minimum(step_s, _SLOW_STEP * usual))


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
