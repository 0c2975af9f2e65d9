"""One run folder, read: its config, its metrics and, once the run has ended, its summary."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from est_cli.errors import UserError, nearest
from est_cli.reports.metrics import read_metrics
from est_cli.subnet.schedule import Rates, Stage, StageSpec, build_stages

_NOT_RUNS = {"checkpoints", "report", "wandb", ".hydra", ".git"}
_LAST_VALUES = {
    "val_loss": "val/loss",
    "tokens": "tokens",
    "flops_total": "flops/total",
    "flops_full_total": "flops/full_total",
    "flops_saved": "flops/saved",
    "flops_saved_blocks": "flops/saved_blocks",
    "train_s": "seconds",
}


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it. `columns` are float64 [rows], one row a parsed line of metrics.jsonl."""

    name: str
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    columns: dict[str, np.ndarray]
    n_lines: int = 0
    problems: tuple[str, ...] = ()
    """What could not be read, in words."""

    def column(self, key: str) -> np.ndarray:
        """float64 [rows]; all NaN where the run never logged `key`."""
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
        """`done`, `stopped`, `failed`, or `unfinished`: neither a summary nor an error is there yet."""
        if self._summary_is_current:
            return str(self.summary.get("status", "done"))
        return "failed" if (self.folder / "error.txt").is_file() else "unfinished"

    @property
    def _summary_is_current(self) -> bool:
        # A stopped run that was continued has an old summary until it ends again.
        return self.summary is not None and (self.summary.get("steps") or 0) >= self.steps_done

    @cached_property
    def outcome(self) -> dict[str, float]:
        """The key numbers under summary.json's names: from there, or from the last line that has them."""
        last = {name: _last_number(self.column(key)) for name, key in _LAST_VALUES.items()}
        last["steps"] = float(self.steps_done)
        if self._summary_is_current:
            last |= {
                name: float(self.summary[name]) for name in last if isinstance(self.summary.get(name), int | float)
            }
        return last

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The config's stages, with fractions for what has joined; where it does not tell, those of the metrics."""
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
    """The runs in `paths`, run folders (they hold metrics.jsonl) or folders of them, each run once.

    Raises UserError for paths that hold no run, all of them at once.
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
    names = _names([(folder, root) for folder, root in found.values()])
    return [_read_run(name, folder) for name, (folder, _) in zip(names, found.values(), strict=True)]


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


def _names(found: Sequence[tuple[Path, Path]]) -> list[str]:
    names = [folder.relative_to(root).as_posix() if folder != root else folder.resolve().name for folder, root in found]
    return [
        f"{folder.resolve().parent.name}/{folder.resolve().name}" if names.count(name) > 1 else name
        for name, (folder, _) in zip(names, found, strict=True)
    ]


def _read_run(name: str, folder: Path) -> RunRecord:
    problems: list[str] = []
    config = _read_mapping(folder / "config.yaml", yaml.safe_load, problems)
    summary = _read_mapping(folder / "summary.json", json.loads, problems)
    if config is None:
        problems.append(f"{name}: no config.yaml")
    columns, n_lines = read_metrics(folder / "metrics.jsonl")
    return RunRecord(name, folder, config or {}, summary, columns, n_lines, tuple(problems))


def _read_mapping(path: Path, parse: Any, problems: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
    return content if isinstance(content, dict) else None
