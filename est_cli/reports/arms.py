"""Arms: runs with one configuration and different seeds, which share a colour, a letter and a label."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from est_cli.reports.differences import SEED, Difference, differences
from est_cli.reports.records import RunRecord
from est_cli.units import format_setting

N_COLOURS = 7
"""Arms beyond the best so many are drawn in one grey."""
_LONGEST_LABEL = 38


@dataclass(frozen=True)
class Arm:
    rank: int
    """From 0, lowest mean validation loss first."""
    label: str
    runs: tuple[RunRecord, ...]

    @property
    def letter(self) -> str:
        """A … Z, AA, AB …"""
        letters, rest = "", self.rank + 1
        while rest:
            rest, digit = divmod(rest - 1, 26)
            letters = chr(ord("A") + digit) + letters
        return letters

    @property
    def coloured(self) -> bool:
        return self.rank < N_COLOURS

    def values(self, name: str) -> list[float]:
        """One of summary.json's numbers, for the runs that have it."""
        return [run.outcome[name] for run in self.runs if math.isfinite(run.outcome[name])]

    def mean(self, name: str) -> float:
        values = self.values(name)
        return float(np.mean(values)) if values else math.nan

    def spread(self, name: str) -> float:
        """Sample standard deviation over seeds; NaN for a single run."""
        values = self.values(name)
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """What the whole report is drawn from."""

    runs: tuple[RunRecord, ...]
    differing: dict[str, Difference] = field(default_factory=dict)
    """By config key."""

    @classmethod
    def of(cls, runs: Sequence[RunRecord]) -> "Comparison":
        return cls(tuple(runs), differences(runs))

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """Best first; runs without a validation loss last."""
        keys = [key for key in self.differing if key != SEED]
        groups: dict[tuple[str, ...], list[RunRecord]] = {}
        for index, run in enumerate(self.runs):
            identity = tuple(repr(self.differing[key].values[index]) for key in keys)
            # Without a differing seed, equal configs are separate runs that people want to tell apart.
            identity += () if SEED in self.differing else (str(index),)
            groups.setdefault(identity, []).append(run)
        labels = self._labels(list(groups.values()), keys)
        arms = [Arm(0, label, tuple(group)) for label, group in zip(labels, groups.values(), strict=True)]
        arms.sort(key=lambda arm: (math.isnan(arm.mean("val_loss")), arm.mean("val_loss")))
        return tuple(Arm(rank, arm.label, arm.runs) for rank, arm in enumerate(arms))

    @property
    def single(self) -> bool:
        return len(self.runs) == 1

    def _labels(self, groups: Sequence[Sequence[RunRecord]], keys: Sequence[str]) -> list[str]:
        names = [str(group[0].setting("name") or "") for group in groups]
        folders = [re.sub(r"[_-]?seed[-=]?\d+", "", group[0].name) or group[0].name for group in groups]
        settings = [self._settings(group[0], keys) for group in groups]
        for candidates in (names, settings, folders):
            distinct = len(set(candidates)) == len(groups) and all(candidates)
            if distinct and len(groups) > 1 and (candidates is not settings or _fit(settings)):
                return [shortened(label) for label in candidates]
        return [shortened(group[0].name) for group in groups]

    def _settings(self, run: RunRecord, keys: Sequence[str]) -> str:
        index = next(i for i, other in enumerate(self.runs) if other is run)
        return ", ".join(f"{short_key(key, keys)} {format_setting(self.differing[key].values[index])}" for key in keys)


def short_key(key: str, keys: Sequence[str]) -> str:
    """The key's last part, where no other key ends in it."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def shortened(label: str) -> str:
    """One line of at most 38 printable characters."""
    label = "".join(c if c.isprintable() else " " for c in label)
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _fit(labels: Sequence[str]) -> bool:
    return all(len(label) <= _LONGEST_LABEL for label in labels)
