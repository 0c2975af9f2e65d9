"""What a comparison says about its arms: loss, FLOPs and time, and what each saves at equal loss.

If the runs also try settings of the optimizer, every arm appears at its own best setting. A baseline at a learning rate
that suits another arm proves nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from est_cli.experiments.arms import DENSE, FULL, FULL_SAME_FLOPS
from est_cli.experiments.saving import COSTS, FullModel, MeasuredArm, Saving, is_clear, over_seeds, seed_of
from est_cli.reports.comparison import short_key
from est_cli.reports.records import RunRecord
from est_cli.tracking.summary import narrow_table
from est_cli.units import format_clock, format_count, format_flops, format_loss, format_setting

_AXES = {"steps": ("step", format_count), "flops": ("flops/total", format_flops), "seconds": ("seconds", format_clock)}
"""What a run spends: the column of its metrics, and how it is written."""


@dataclass(frozen=True)
class TunedArm(MeasuredArm):
    """An arm at its best setting."""

    tuned: Sequence[str]
    """The keys that every arm sets to what suits it."""
    tried: Sequence[RunRecord]
    """The runs at all settings, failed ones too."""

    @property
    def name(self) -> str:
        return self.runs[0].setting("name")

    @property
    def settings(self) -> dict[str, Any]:
        return {key: self.runs[0].setting(key) for key in self.tuned}

    @property
    def at_edge(self) -> list[str]:
        """The keys whose best value is the lowest or the highest that was tried."""
        return [key for key, best in self.settings.items() if _is_edge(best, [run.setting(key) for run in self.tried])]

    @cached_property
    def to_baseline(self) -> dict[str, np.ndarray]:
        """[seeds] Steps, FLOPs and seconds until an evaluation was as low as the full model's final loss."""
        reached = [_first_reached(run, loss) for run, loss in zip(self.runs, self.full_losses, strict=True)]
        return dict(zip(_AXES, np.transpose(reached), strict=True))

    def facts(self) -> dict[str, Any]:
        """The arm as plain values for JSON."""
        savings = {key: self.saving(key) for key in COSTS}
        return {
            "arm": self.name,
            **({"settings": self.settings} if self.settings else {}),
            "seeds": self.seeds,
            **{key: _plain(self.outcomes(key)) for key in ("val_loss", "flops_total", "train_s")},
            "to_baseline": {axis: _plain(reached) for axis, reached in self.to_baseline.items()},
            "to_full": _plain(self.to_full),
            "to_same_flops": _plain(self.to_same_flops),
            "saved_at_equal_loss": {
                key: {"share": None if math.isnan(saving.share) else saving.share, "bound": saving.bound}
                for key, saving in savings.items()
            },
            "lr_at_edge": "optimizer.lr" in self.at_edge,
            "at_edge": self.at_edge,
        }

    def sentence(self, same_flops: bool) -> str | None:
        """`same_flops`: whether the full model was also trained for the same FLOPs."""
        said = []
        if self.full.runs:
            fewer = Saving(1 - self.share).words("fewer", "FLOPs")
            said.append(f"for the same tokens {fewer}, and its loss {_to_full_model(self.to_full)}")
        if same_flops:
            said.append(f"for the same FLOPs its loss {_to_full_model(self.to_same_flops)}")
        flops, time = map(self.saving, COSTS)
        if not math.isnan(flops.share) or not math.isnan(time.share):
            said.append(f"for the same loss it takes {flops.words('fewer', 'FLOPs')} and {time.words('less', 'time')}")
        return f"{self.name}: {'; '.join(said)}." if said else None


@dataclass(frozen=True)
class Verdict:
    arms: tuple[TunedArm, ...]
    """Those that evolve, best first, then those that do not."""

    @classmethod
    def of(cls, runs: Sequence[RunRecord], tuned: Sequence[str] = (), failed: Sequence[RunRecord] = ()) -> "Verdict":
        """The verdict on finished runs, which differ in arm, seed, and the keys `tuned`.

        Each run is compared with the full model of its seed. The settings of `failed` runs were tried as well.
        """
        by_arm: dict[str, list[RunRecord]] = {}
        for run in runs:
            by_arm.setdefault(run.setting("name"), []).append(run)
        best = {arm: _best_setting(group, tuned) for arm, group in by_arm.items()}
        evolving = sorted((arm for arm in best if arm not in DENSE), key=lambda arm: (_mean_loss(best[arm]), arm))
        full = FullModel.of(best.get(FULL, []), best.get(FULL_SAME_FLOPS, []))
        names = [*evolving, *(arm for arm in DENSE if arm in best)]
        tried = {arm: [*by_arm[arm], *(run for run in failed if run.setting("name") == arm)] for arm in names}
        return cls(tuple(TunedArm(best[arm], full, tuned, tried[arm]) for arm in names))

    @property
    def runs(self) -> list[RunRecord]:
        """The runs of every arm at its best setting."""
        return [run for arm in self.arms for run in arm.runs]

    def show(self, console: Console, at_a_time: int | None = None) -> None:
        """`at_a_time`: how many runs shared the machine, if that is known."""
        names, keys = [arm.name for arm in self.arms], list(self.arms[0].tuned)
        results = arm_table(*(short_key(key, keys) for key in keys), "seeds", "val loss", "FLOPs", "time")
        reached = arm_table("steps", "FLOPs", "time")
        columns = (("val_loss", format_loss), ("flops_total", format_flops), ("train_s", format_clock))
        for arm in self.arms:
            means = (over_seeds(arm.outcomes(key), write) for key, write in columns)
            results.add_row(arm.name, *map(format_setting, arm.settings.values()), str(len(arm.runs)), *means)
            reached.add_row(arm.name, *(over_seeds(arm.to_baseline[axis], write) for axis, (_, write) in _AXES.items()))
        console.print("mean ± standard deviation over seeds", style="italic")
        console.print(results)
        if keys:
            console.print(f"Every arm at the best of its values of {', '.join(keys)}.", style="dim")
        for key in keys:
            edges = [f"{arm.name} ({format_setting(arm.settings[key])})" for arm in self.arms if key in arm.at_edge]
            if edges:
                console.print(
                    f"At an edge of the values of {key} that were tried: {', '.join(edges)}.", highlight=False
                )
        if at_a_time is not None:
            console.print(f"Times are of {at_a_time} run{'s' if at_a_time > 1 else ''} at a time.", style="dim")
        if FULL in names:
            console.print(f"\nuntil an evaluation is as low as the final loss of arm {FULL}", style="italic")
            console.print(reached)
        console.print()
        for sentence in self.sentences():
            console.print(sentence, highlight=False, markup=False)
        if {FULL, FULL_SAME_FLOPS} <= set(names):
            console.print(
                "Between its two lengths the full model's loss is taken as linear in the logarithm of its cost. The "
                "true curve is convex and lies below this chord, which flatters the other arms a little.",
                style="dim",
            )

    def sentences(self) -> list[str]:
        """One for every arm except the full model's, best first."""
        same_flops = any(arm.name == FULL_SAME_FLOPS for arm in self.arms)
        others = [arm for arm in self.arms if arm.name not in (FULL, FULL_SAME_FLOPS)]
        others.sort(key=lambda arm: _mean_loss(arm.runs))
        return [said for arm in others if (said := arm.sentence(same_flops))]


def arm_table(*columns: str) -> Table:
    """A table with a row for each arm and numbers in `columns`."""
    table = narrow_table()
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _to_full_model(differences: np.ndarray) -> str:
    """`is 0.0210 ± 0.0040 below the full model's (2 seeds)`: mean and spread of one difference a seed."""
    known = differences[np.isfinite(differences)]
    if not len(known):
        return "has no full model to compare with"
    mean, n = known.mean(), len(known)
    side = f"{'below' if mean < 0 else 'above'} the full model's"
    if n == 1:
        return f"is {format_loss(abs(mean))} {side} (one seed: no spread is known)"
    unclear = "" if is_clear(known) else ", no clear difference"
    return f"is {format_loss(abs(mean))} ± {format_loss(known.std(ddof=1))} {side} ({n} seeds{unclear})"


def _first_reached(run: RunRecord, target: float) -> list[float]:
    """What was spent at the first evaluation with at most this loss, by the _AXES; NaN if there is none."""
    reached = np.flatnonzero(run.column("val/loss") <= target)
    if not len(reached):
        return [math.nan] * len(_AXES)
    step, *rest = (float(run.column(column)[reached[0]]) for column, _ in _AXES.values())
    return [step + 1, *rest]


def _best_setting(runs: Sequence[RunRecord], tuned: Sequence[str]) -> list[RunRecord]:
    """The runs, by seed, of the setting with the lowest mean loss among those that most seeds have finished."""
    settings: dict[str, list[RunRecord]] = {}
    for run in sorted(runs, key=seed_of):
        settings.setdefault(str([run.setting(key) for key in tuned]), []).append(run)
    seeds = max(map(len, settings.values()))
    return min((group for group in settings.values() if len(group) == seeds), key=_mean_loss)


def _mean_loss(runs: Sequence[RunRecord]) -> float:
    """Infinite if a run diverged."""
    mean = math.fsum(run.outcome["val_loss"] for run in runs) / len(runs)
    return math.inf if math.isnan(mean) else mean


def _is_edge(best: Any, tried: Sequence[Any]) -> bool:
    """Whether `best` is the lowest or the highest of several numbers; 0 is no edge, as weight decay has none below."""
    numbers = {value for value in tried if isinstance(value, int | float) and not isinstance(value, bool)}
    return len(numbers) > 1 and best in (min(numbers), max(numbers)) and best != 0


def _plain(numbers: np.ndarray) -> list[float | None]:
    return [float(number) if math.isfinite(number) else None for number in numbers]
