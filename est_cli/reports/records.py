"""A run read from its folder: config.yaml, metrics.jsonl and, once it has ended, summary.json.

Parsing every line of a long metrics.jsonl takes several times as long as drawing the report, and no figure shows more
than a few thousand points. So only an even selection of lines is parsed, and every line with a validation loss: a
million lines take about a second.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from est_cli.config import CONFIG_FILE
from est_cli.errors import UserError, nearest
from est_cli.subnet.schedule import Rates, Stage, StageSpec, build_stages

MAX_PARSED_LINES = 20_000
_CHUNK_BYTES = 1 << 24
_SLOW_STEP = 3.0
"""A step of more than this many medians of its stage (compilation, for example) does not stand for unlogged steps."""
_NOT_RUNS = {"checkpoints", "report", "wandb", ".hydra", ".git"}
_EVALUATED = re.compile(rb'"val/loss": (?!null)')
_LAST_VALUES = ("val/loss", "tokens", "flops/total", "flops/full_total", "flops/saved", "flops/saved_blocks")


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run as its folder describes it. A record equals only itself."""

    name: str
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    """None until the run has ended, also for a stopped run that has been continued."""
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
        if self.summary is not None:
            return str(self.summary.get("status", "done"))
        return "failed" if (self.folder / "error.txt").is_file() else "unfinished"

    @cached_property
    def outcome(self) -> dict[str, float]:
        """The key numbers by summary.json's names, from the summary or from the last line that has them."""
        last = {key.replace("/", "_"): _last_number(self.column(key)) for key in _LAST_VALUES}
        last |= {"train_s": _last_number(self.column("seconds")), "steps": float(self.steps_done)}
        told = self.summary or {}
        return last | {name: float(told[name]) for name in last if isinstance(told.get(name), int | float)}

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The config's stages, with fractions for what has joined; those of the metrics if the config is incomplete."""
        try:
            specs = [of_known_keys(StageSpec, spec) for spec in self.config["scheduler"]["stages"]]
            stages = build_stages(specs, self.config["trainer"]["max_steps"])
            return tuple(replace(stage, grown=stage.grown.fractions(self.config["model"])) for stage in stages)
        except (KeyError, TypeError, ValueError, AttributeError):
            return self._logged_stages()

    def _logged_stages(self) -> tuple[Stage, ...]:
        if "stage" not in self.columns:
            return ()
        numbers, rows = np.unique(self.columns["stage"], return_index=True)
        edges = [0, *map(int, self.columns["step"][rows[1:]]), self.steps_done]
        kept = np.transpose([self.column(f"subnet/{unit}")[rows] for unit in ("heads", "mlp", "layers")]).tolist()
        return tuple(
            Stage(int(number), first, end, Rates(*rates))
            for number, (first, end), rates in zip(numbers, pairwise(edges), kept, strict=True)
        )


def of_known_keys(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from a section of config.yaml, which another version may have written."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def _last_number(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")


def load_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in `paths`, each once. A path is a run folder, which holds metrics.jsonl, or a folder of run folders.

    Raises one UserError for all paths that hold no run.
    """
    problems = [] if paths else ["runs=[]: must name at least one run or sweep folder"]
    found: dict[Path, tuple[Path, Path]] = {}
    for path in map(Path, paths):
        folders = _run_folders(path)
        if not folders:
            problems.append(_explain_nothing(path))
        for folder in folders:
            found.setdefault(folder.resolve(), (folder, path))
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
    parent = next(p for p in path.parents if p.is_dir())
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    missing = path.relative_to(parent).parts[0]
    return f"runs={path}: there is no such folder; must be {what}{nearest(missing, siblings)}"


def _read_run(name: str, folder: Path) -> RunRecord:
    problems: list[str] = []
    config = _read_mapping(folder / CONFIG_FILE, yaml.safe_load, problems)
    summary = _read_mapping(folder / "summary.json", json.loads, problems)
    if config is None:
        problems.append(f"{name}: no {CONFIG_FILE}")
    columns, n_lines = read_metrics(folder / "metrics.jsonl")
    run = RunRecord(name, folder, config or {}, summary, columns, n_lines, tuple(problems))
    is_old = summary is not None and (summary.get("steps") or 0) < run.steps_done
    return replace(run, summary=None) if is_old else run


def _read_mapping(path: Path, parse: Callable[[str], Any], problems: list[str]) -> dict[str, Any] | None:
    try:
        content = parse(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
    return content if isinstance(content, dict) else None


def read_metrics(path: Path, max_lines: int = MAX_PARSED_LINES) -> tuple[dict[str, np.ndarray], int]:
    """The columns of a metrics file and the number of its whole lines.

    Every column is float64 [rows], NaN where a row has no number for it. Two are added: `seconds`, training time so
    far, and `train/loss_smoothed`. Lines that are not JSON objects with a `step`, such as a last line that was cut
    short, are skipped.
    """
    with path.open("rb") as file:
        n_lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))
        # Odd, so the selection does not coincide with what happens every ten or hundred steps.
        stride = -(-n_lines // max_lines) | 1
        file.seek(0)
        lines = (line for i, line in enumerate(file) if i % stride == 0 or i >= n_lines - 1 or _EVALUATED.search(line))
        rows = [row for row in map(_parse, lines) if row is not None]
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    columns = {key: np.array([row.get(key) for row in rows], dtype=np.float64) for key in keys}
    if rows:
        stage = columns.get("stage", np.zeros(len(rows)))
        if "perf/step_s" in columns:
            columns["seconds"] = _training_seconds(columns["step"], columns["perf/step_s"], stage)
        if "train/loss" in columns:
            columns["train/loss_smoothed"] = smoothed(columns["train/loss"], stage)
    return columns, n_lines


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _training_seconds(step: np.ndarray, step_s: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Seconds of training up to each row; a row stands for all steps since the row before it. [rows]"""
    step_s, usual = np.nan_to_num(step_s), np.empty_like(step_s)
    for number in np.unique(stage):
        usual[stage == number] = np.median(step_s[stage == number])
    steps_since = np.diff(step, prepend=-1.0)
    return np.cumsum(step_s + (steps_since - 1) * np.minimum(step_s, _SLOW_STEP * usual))


def smoothed(loss: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """A running mean over about 1% of the run that never crosses a stage boundary; NaN where `loss` is. [rows]"""
    known = np.isfinite(loss)
    window = max(1, known.sum() // 100)
    parts = np.split(loss[known], np.flatnonzero(np.diff(stage[known])) + 1)
    means = np.full_like(loss, np.nan)
    means[known] = np.concatenate([running_mean(part, window) for part in parts])
    return means


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over up to `window` values around each value; over fewer at the ends. [n] → [n]"""
    n, half = len(values), window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    return (total[high] - total[low]) / (high - low)


def evenly(n: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0 … n − 1, evenly taken, with the first and the last."""
    return np.linspace(0, n - 1, min(most, n)).round().astype(int)
