"""What runs are compared by: settings that differ, arms of equal settings, and stage times."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from est_cli.reports.records import RunRecord
from est_cli.subnet.schedule import Stage
from est_cli.units import format_setting

N_COLOURS = 7
"""How many arms, best first, have a colour of their own; the others are grey."""
SEED = "seed"
_STAGES = "scheduler.stages"
_NOT_SETTINGS = {"run_id", "name", "format", "data.cache_dir", "logger"}
_LARGEST_PAIRS = 3
_LONGEST_LABEL = 38


@dataclass(frozen=True)
class Difference:
    """The values of a config key that are not all equal."""

    values: dict[RunRecord, Any]
    """None for a run without the key."""
    also: list[str] = field(default_factory=list)
    """Other keys with the same values in every run, except for keys of stages, which refer to settings."""


def differences(runs: Sequence[RunRecord]) -> dict[str, Difference]:
    """The differences between the runs' configs, by key. Keys that always agree with each other are one difference."""
    flat = [dict(_flatten(run.config)) for run in runs]
    if len({len(run.setting(_STAGES) or ()) for run in runs}) > 1:
        flat = _with_stages_as_text(flat, runs)
    keys = sorted(set().union(*flat), key=lambda key: (key == SEED, key.startswith(f"{_STAGES}["), key))
    found: dict[tuple[str, ...], tuple[str, Difference]] = {}
    for key in keys:
        values = [config.get(key) for config in flat]
        identity = tuple(map(repr, values))
        if identity in found:
            found[identity][1].also.extend([] if key.startswith(f"{_STAGES}[") else [key])
        elif len(set(identity)) > 1:
            found[identity] = key, Difference(dict(zip(runs, values, strict=True)))
    return dict(found.values())


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a config; an item of a list of sections is `key[0]`."""
    if path in _NOT_SETTINGS:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{path}[{index}]")
    else:
        yield path, value


def _with_stages_as_text(flat: Sequence[dict[str, Any]], runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Schedules of different lengths as `0.5/0.5/0.5 to step 20, 1/1/1 to step 150`: rates of heads, MLP and layers.

    Schedule keys that only some runs have, such as `scheduler.stage1_end`, are left out if their values do not differ.
    """

    def text(stage: Stage) -> str:
        rates = (stage.kept.heads, stage.kept.mlp, stage.kept.layers)
        return f"{'/'.join(map(format_setting, rates))} to step {stage.end}"

    keys = {key for config in flat for key in config if key.startswith("scheduler.")}
    dropped = {key for key in keys if len({repr(config[key]) for config in flat if key in config}) == 1}
    dropped |= {key for key in keys if key.startswith(f"{_STAGES}[")}
    return [
        {key: value for key, value in config.items() if key not in dropped}
        | {_STAGES: ", ".join(map(text, run.stages))}
        for config, run in zip(flat, runs, strict=True)
    ]


def swept_pairs(differing: dict[str, Difference]) -> list[tuple[str, str]]:
    """Pairs of differing keys that the runs cross: at least 2×2 values, and half of the grid filled."""
    values = {key: list(map(str, difference.values.values())) for key, difference in differing.items()}
    keys = [key for key in values if key != SEED]
    if len(keys) == 1 and keys != [_STAGES] and SEED in values:
        keys = [*keys, SEED]
    sizes = {}
    for a, b in itertools.combinations(keys, 2):
        n_a, n_b, n_cells = len(set(values[a])), len(set(values[b])), len(set(zip(values[a], values[b], strict=True)))
        if min(n_a, n_b) >= 2 and n_cells > max(n_a, n_b) and 2 * n_cells >= n_a * n_b:
            sizes[a, b] = n_a * n_b
    return sorted(sizes, key=lambda pair: -sizes[pair])[:_LARGEST_PAIRS]


@dataclass(frozen=True)
class Arm:
    """Runs with one configuration and different seeds, which share a colour, a letter and a label."""

    rank: int
    """From 0, lowest mean validation loss first."""
    label: str
    runs: tuple[RunRecord, ...]

    @property
    def letter(self) -> str:
        """A … Z, AA, AB …"""
        first, last = divmod(self.rank, 26)
        return (chr(ord("A") + first - 1) if first else "") + chr(ord("A") + last)

    @property
    def coloured(self) -> bool:
        return self.rank < N_COLOURS

    @property
    def statuses(self) -> str:
        return ", ".join(sorted({run.status for run in self.runs}))

    def values(self, name: str) -> list[float]:
        """One of summary.json's numbers, from the runs that have it."""
        return [run.outcome[name] for run in self.runs if math.isfinite(run.outcome[name])]

    def mean(self, name: str) -> float:
        values = self.values(name)
        return float(np.mean(values)) if values else math.nan

    def spread(self, name: str) -> float:
        """Sample standard deviation over seeds; NaN for a single run."""
        values = self.values(name)
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    @cached_property
    def stage_times(self) -> list["StageTime"]:
        """The stages that have step times, in order."""
        measured = []
        for stage in max((run.stages for run in self.runs), key=len):
            step_s, flops = self._logged("perf/step_s", stage), self._logged("flops/step", stage)
            if len(step_s):
                measured.append(StageTime(stage, step_s, float(np.median(flops)) if len(flops) else math.nan))
        full = next((entry for entry in measured if entry.stage.is_full), None)
        return [replace(entry, full=full) for entry in measured]

    def _logged(self, key: str, stage: Stage) -> np.ndarray:
        """All runs' values in a stage, without its first step, which pays for compilation, if there are more."""
        found = []
        for run in self.runs:
            inside = run.column("stage") == stage.number
            later = inside & (run.column("step") > stage.first_step)
            found.append(run.column(key)[later if later.any() else inside])
        values = np.concatenate(found)
        return values[np.isfinite(values)]


@dataclass(frozen=True)
class StageTime:
    """How long an optimizer step took in one stage of one arm, over all its runs."""

    stage: Stage
    step_s: np.ndarray
    """float64 [samples], seconds."""
    flops: float
    """Median FLOPs of a step."""
    full: "StageTime | None" = None
    """The arm's stage that trains the full model."""

    @property
    def median(self) -> float:
        return float(np.median(self.step_s))

    @property
    def time_ratio(self) -> float:
        """Against the full model's stage; NaN if there is none."""
        return self.median / self.full.median if self.full else math.nan

    @property
    def flops_ratio(self) -> float:
        return self.flops / self.full.flops if self.full else math.nan


@dataclass(frozen=True)
class Comparison:
    """The runs of a report and what differs between them."""

    runs: Sequence[RunRecord]

    @cached_property
    def differing(self) -> dict[str, Difference]:
        """By config key."""
        return differences(self.runs)

    @property
    def single(self) -> bool:
        return len(self.runs) == 1

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """Best first; runs without a validation loss last."""
        keys = [key for key in self.differing if key != SEED]
        groups: dict[tuple[str, ...], list[RunRecord]] = {}
        for index, run in enumerate(self.runs):
            identity = tuple(repr(self.differing[key].values[run]) for key in keys)
            # If no seed differs, runs with equal configs are separate arms, because people want to tell them apart.
            identity += () if SEED in self.differing else (str(index),)
            groups.setdefault(identity, []).append(run)
        labels = self._labels([group[0] for group in groups.values()], keys)
        arms = [Arm(0, label, tuple(group)) for label, group in zip(labels, groups.values(), strict=True)]
        arms.sort(key=lambda arm: (math.isnan(arm.mean("val_loss")), arm.mean("val_loss")))
        return tuple(replace(arm, rank=rank) for rank, arm in enumerate(arms))

    @property
    def coloured_arms(self) -> tuple[Arm, ...]:
        return self.arms[:N_COLOURS]

    @property
    def baseline(self) -> Arm | None:
        """The best arm that trains the full model throughout; the times of other arms are compared with its time."""
        return next((arm for arm in self.arms if abs(arm.mean("flops_saved")) < 1e-9), None)

    def _labels(self, runs: Sequence[RunRecord], keys: Sequence[str]) -> list[str]:
        """Names, else the settings that differ, else folders: the first of them that tells all groups apart."""
        names = [str(run.setting("name") or "") for run in runs]
        folders = [re.sub(r"[_-]?seed[-=]?\d+", "", run.name) or run.name for run in runs]
        settings = [
            ", ".join(f"{short_key(key, keys)} {format_setting(self.differing[key].values[run])}" for key in keys)
            for run in runs
        ]
        for labels in (names, settings, folders):
            distinct = len(set(labels)) == len(runs) > 1 and all(labels)
            if distinct and (labels is not settings or max(map(len, settings)) <= _LONGEST_LABEL):
                return [shortened(label) for label in labels]
        return [shortened(run.name) for run in runs]


def short_key(key: str, keys: Sequence[str]) -> str:
    """The key's last part, unless another key ends in it too."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def shortened(label: str, longest: int = _LONGEST_LABEL) -> str:
    """One line of at most `longest` printable characters."""
    label = "".join(c if c.isprintable() else " " for c in label)
    return label if len(label) <= longest else label[: longest - 1] + "…"
