"""What a comparison of the three arms says: loss, FLOPs and time, and the cost of the baseline's final loss.

Where the runs also try settings of the optimizer, every arm stands there with the one that suits it best: a baseline
at a learning rate that suits another arm proves nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from est_cli.commands.arms import ARMS, EST, FULL, FULL_SAME_FLOPS
from est_cli.reports.arms import short_key
from est_cli.reports.records import RunRecord
from est_cli.tracking.summary import narrow_table
from est_cli.units import format_clock, format_count, format_flops, format_loss, format_percent, format_setting

_AXES = ("step", "flops/total", "seconds")


@dataclass(frozen=True)
class ArmResult:
    """One arm, one value a seed everywhere."""

    name: str
    seeds: tuple[int, ...]
    val_loss: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    to_baseline: dict[str, np.ndarray]
    """Steps, FLOPs and seconds until an evaluation was as low as the full model's final loss; NaN if none was."""
    settings: dict[str, Any]
    """What the arm was tuned to, by config key."""

    @classmethod
    def of(cls, name: str, runs: Sequence[RunRecord], targets: dict[int, float], tuned: Sequence[str]) -> "ArmResult":
        def outcomes(key: str) -> np.ndarray:
            return np.array([run.outcome[key] for run in runs])

        reached = [_first_reached(run, targets.get(run.setting("seed"), math.nan)) for run in runs]
        to_baseline = dict(zip(("steps", "flops", "seconds"), np.array(reached).T, strict=True))
        return cls(
            name=name,
            seeds=tuple(run.setting("seed") for run in runs),
            val_loss=outcomes("val_loss"),
            flops=outcomes("flops_total"),
            seconds=outcomes("train_s"),
            to_baseline=to_baseline,
            settings={key: runs[0].setting(key) for key in tuned},
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "arm": self.name,
            **({"settings": self.settings} if self.settings else {}),
            "seeds": list(self.seeds),
            "val_loss": _numbers(self.val_loss),
            "flops_total": _numbers(self.flops),
            "train_s": _numbers(self.seconds),
            "to_baseline": {key: _numbers(values) for key, values in self.to_baseline.items()},
        }


@dataclass(frozen=True)
class Verdict:
    arms: tuple[ArmResult, ...]

    @classmethod
    def of(cls, runs: Sequence[RunRecord], tuned: Sequence[str] = ()) -> "Verdict":
        """The verdict on finished runs, which differ in arm, seed, and the keys `tuned`.

        A seed's runs are held against that seed's full model.
        """
        groups = {arm: _best_setting([run for run in runs if run.setting("name") == arm], tuned) for arm in ARMS}
        targets = {run.setting("seed"): run.outcome["val_loss"] for run in groups[FULL]}
        return cls(tuple(ArmResult.of(arm, group, targets, tuned) for arm, group in groups.items() if group))

    def as_dict(self) -> list[dict[str, Any]]:
        return [arm.as_dict() for arm in self.arms]

    def show(self, console: Console) -> None:
        keys = list(self.arms[0].settings) if self.arms else []
        results = _table(*(short_key(key, keys) for key in keys), "seeds", "val loss", "FLOPs", "time")
        reached = _table("steps", "FLOPs", "time")
        for arm in self.arms:
            settings = map(format_setting, arm.settings.values())
            spent = (_mean(arm.flops, format_flops), _mean(arm.seconds, format_clock))
            results.add_row(arm.name, *settings, str(len(arm.seeds)), _mean(arm.val_loss, format_loss), *spent)
            forms = (("steps", format_count), ("flops", format_flops), ("seconds", format_clock))
            reached.add_row(arm.name, *(_mean(arm.to_baseline[key], form) for key, form in forms))
        console.print("mean ± standard deviation over seeds", style="italic")
        console.print(results)
        if keys:
            console.print(f"Every arm at the best of its values of {', '.join(keys)}.", style="dim")
        if any(arm.name == FULL for arm in self.arms):
            console.print(f"\nuntil an evaluation is as low as the final loss of arm {FULL}", style="italic")
            console.print(reached)
        console.print()
        for sentence in self.sentences():
            console.print(sentence, highlight=False, markup=False)

    def sentences(self) -> list[str]:
        arms = {arm.name: arm for arm in self.arms}
        if EST not in arms:
            return []
        est, said = arms[EST], []
        if FULL in arms:
            full = arms[FULL]
            flops = 1 - est.flops.mean() / full.flops.mean()
            time = 1 - est.seconds.mean() / full.seconds.mean()
            said.append(
                f"For the same tokens EST saves {format_percent(flops)} of the FLOPs and takes {_compared(time)} time; "
                f"{against(est, full)} the full model's."
            )
        if FULL_SAME_FLOPS in arms:
            said.append(f"For the same FLOPs {against(est, arms[FULL_SAME_FLOPS])} the full model's.")
        return said


def _table(*columns: str) -> Table:
    table = narrow_table()
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _compared(saved: float) -> str:
    return f"{format_percent(abs(saved))} {'less' if saved >= 0 else 'more'}"


def against(est: ArmResult, other: ArmResult) -> str:
    """`its loss is 0.0210 ± 0.0040 (2 seeds) below`: paired by seed, whose arms share data and initial weights."""
    losses = dict(zip(other.seeds, other.val_loss, strict=True))
    pairs = zip(est.seeds, est.val_loss, strict=True)
    differences = np.array([loss - losses[seed] for seed, loss in pairs if seed in losses])
    if not len(differences):
        return "no seed in common lets its loss be held against"
    mean, n = float(differences.mean()), len(differences)
    side = "below" if mean < 0 else "above"
    if n == 1:
        return f"its loss is {format_loss(abs(mean))} (one seed: no spread is known) {side}"
    spread = float(differences.std(ddof=1))
    clear = "" if abs(mean) > 2 * spread / math.sqrt(n) else ", no clear difference,"
    return f"its loss is {format_loss(abs(mean))} ± {format_loss(spread)} ({n} seeds{clear}) {side}".replace(",)", ")")


def _first_reached(run: RunRecord, target: float) -> list[float]:
    """Steps, FLOPs and seconds at the first evaluation with at most this loss."""
    reached = np.flatnonzero(run.column("val/loss") <= target)
    if not len(reached):
        return [math.nan] * len(_AXES)
    steps, *rest = (float(run.column(axis)[reached[0]]) for axis in _AXES)
    return [steps + 1, *rest]


def _mean(values: np.ndarray, write: Any) -> str:
    """Mean and spread; how many of the seeds where not all have a value."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "-"
    spread = f" ± {write(float(known.std(ddof=1)))}" if len(known) > 1 and known.std() > 0 else ""
    share = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{write(float(known.mean()))}{spread}{share}"


def _best_setting(runs: Sequence[RunRecord], tuned: Sequence[str]) -> list[RunRecord]:
    """The runs of the setting with the lowest mean loss, by seed; of the settings that most seeds have finished."""
    settings: dict[str, list[RunRecord]] = {}
    for run in sorted(runs, key=_seed):
        settings.setdefault(str([run.setting(key) for key in tuned]), []).append(run)
    seeds = max(map(len, settings.values()), default=0)
    finished = [group for group in settings.values() if len(group) == seeds]
    return min(finished, key=_mean_loss, default=[])


def _mean_loss(runs: Sequence[RunRecord]) -> float:
    """Infinite where a run diverged."""
    mean = math.fsum(run.outcome["val_loss"] for run in runs) / len(runs)
    return math.inf if math.isnan(mean) else mean


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _seed(run: RunRecord) -> int:
    return run.setting("seed")
