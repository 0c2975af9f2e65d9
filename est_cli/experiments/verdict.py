"""What a comparison says about its arms: loss, FLOPs and time, and what each saves at equal loss.

If the runs also try settings of the optimizer, every arm appears at its own best setting: a baseline at a learning rate
that suits another arm proves nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from est_cli.experiments.arms import DENSE, FULL, FULL_SAME_FLOPS
from est_cli.experiments.saving import COSTS, FullModel, Saving, seed_of
from est_cli.reports.comparison import short_key
from est_cli.reports.records import RunRecord
from est_cli.tracking.summary import narrow_table
from est_cli.units import format_clock, format_count, format_flops, format_loss, format_setting

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
    to_full: np.ndarray
    """Loss less that of the full model for the same tokens; NaN where that seed has none."""
    to_same_flops: np.ndarray
    """Loss less that of the full model for the same FLOPs; NaN where it was not measured around them."""
    saved: dict[str, Saving]
    """FLOPs and seconds, at equal loss."""
    at_edge: tuple[str, ...]
    """Keys of `settings` whose value is the lowest or the highest of several that were tried."""

    @classmethod
    def of(
        cls,
        name: str,
        runs: Sequence[RunRecord],
        full: FullModel,
        tuned: Sequence[str] = (),
        tried: Sequence[RunRecord] = (),
    ) -> "ArmResult":
        """`runs` at its best setting; `tried`: its runs at all settings, those that failed too."""

        def outcomes(key: str) -> np.ndarray:
            return np.array([run.outcome[key] for run in runs])

        reached = [_first_reached(run, full.loss(seed_of(run))) for run in runs]
        to_baseline = dict(zip(("steps", "flops", "seconds"), np.array(reached).T, strict=True))
        same_flops = [full.loss_at(seed_of(run), run.outcome["flops_total"]) for run in runs]
        return cls(
            name=name,
            seeds=tuple(run.setting("seed") for run in runs),
            val_loss=outcomes("val_loss"),
            flops=outcomes("flops_total"),
            seconds=outcomes("train_s"),
            to_baseline=to_baseline,
            settings={key: runs[0].setting(key) for key in tuned},
            to_full=outcomes("val_loss") - [full.loss(seed_of(run)) for run in runs],
            to_same_flops=outcomes("val_loss") - same_flops,
            saved={key: full.saving(runs, key) for key in COSTS},
            at_edge=tuple(key for key in tuned if _is_edge(runs[0].setting(key), [run.setting(key) for run in tried])),
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
            "to_full": _numbers(self.to_full),
            "to_same_flops": _numbers(self.to_same_flops),
            "saved_at_equal_loss": {
                key: {"share": None if math.isnan(saving.share) else saving.share, "bound": saving.bound}
                for key, saving in self.saved.items()
            },
            "lr_at_edge": "optimizer.lr" in self.at_edge,
            "at_edge": list(self.at_edge),
        }


@dataclass(frozen=True)
class Verdict:
    arms: tuple[ArmResult, ...]
    """Those that evolve, best first, then those that do not."""
    runs: tuple[RunRecord, ...] = ()
    """Of every arm, at its best setting."""

    @classmethod
    def of(cls, runs: Sequence[RunRecord], tuned: Sequence[str] = (), failed: Sequence[RunRecord] = ()) -> "Verdict":
        """The verdict on finished runs, which differ in arm, seed, and the keys `tuned`.

        A seed's runs are held against that seed's full model. A setting at which a run `failed` was tried as well.
        """
        by_arm: dict[str, list[RunRecord]] = {}
        for run in runs:
            by_arm.setdefault(run.setting("name"), []).append(run)
        best = {arm: _best_setting(group, tuned) for arm, group in by_arm.items()}
        evolving = sorted((arm for arm in best if arm not in DENSE), key=lambda arm: (_mean_loss(best[arm]), arm))
        full = FullModel.of(best.get(FULL, []), best.get(FULL_SAME_FLOPS, []))
        names = [*evolving, *(arm for arm in DENSE if arm in best)]
        tried = {arm: [*by_arm[arm], *(run for run in failed if run.setting("name") == arm)] for arm in names}
        return cls(
            tuple(ArmResult.of(arm, best[arm], full, tuned, tried[arm]) for arm in names),
            tuple(run for arm in names for run in best[arm]),
        )

    def as_dict(self) -> list[dict[str, Any]]:
        return [arm.as_dict() for arm in self.arms]

    def show(self, console: Console, at_a_time: int | None = None) -> None:
        """`at_a_time`: how many runs shared the machine, where that is known."""
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
        for key in keys:
            edges = [f"{arm.name} ({format_setting(arm.settings[key])})" for arm in self.arms if key in arm.at_edge]
            if edges:
                console.print(
                    f"At an edge of the values of {key} that were tried: {', '.join(edges)}.", highlight=False
                )
        if at_a_time is not None:
            console.print(f"Times are of {at_a_time} run{'s' if at_a_time > 1 else ''} at a time.", style="dim")
        if any(arm.name == FULL for arm in self.arms):
            console.print(f"\nuntil an evaluation is as low as the final loss of arm {FULL}", style="italic")
            console.print(reached)
        console.print()
        for sentence in self.sentences():
            console.print(sentence, highlight=False, markup=False)
        if {FULL, FULL_SAME_FLOPS} <= {arm.name for arm in self.arms}:
            console.print(
                "Between its two lengths the full model's loss is taken as linear in the logarithm of its cost. The "
                "true curve is convex and lies below this chord, which flatters the other arms a little.",
                style="dim",
            )

    def sentences(self) -> list[str]:
        """One for every arm but the full model's, best first."""
        arms = {arm.name: arm for arm in self.arms}
        others = [arm for arm in self.arms if arm.name not in (FULL, FULL_SAME_FLOPS)]
        others.sort(key=lambda arm: float(arm.val_loss.mean()))
        return [said for arm in others if (said := _sentence(arm, arms.get(FULL), FULL_SAME_FLOPS in arms))]


def _sentence(arm: ArmResult, full: ArmResult | None, same_flops: bool) -> str | None:
    said = []
    if full is not None:
        fewer = Saving(1 - arm.flops.mean() / full.flops.mean()).words("fewer", "FLOPs")
        said.append(f"for the same tokens {fewer}, and its loss {_to_full_model(arm.to_full)}")
    if same_flops:
        said.append(f"for the same FLOPs its loss {_to_full_model(arm.to_same_flops)}")
    if any(not math.isnan(saving.share) for saving in arm.saved.values()):
        flops, time = arm.saved["flops"].words("fewer", "FLOPs"), arm.saved["seconds"].words("less", "time")
        said.append(f"for the same loss it takes {flops} and {time}")
    return f"{arm.name}: {'; '.join(said)}." if said else None


def _to_full_model(differences: np.ndarray) -> str:
    known = differences[np.isfinite(differences)]
    return f"is {_difference(known)} the full model's" if len(known) else "has no full model's to be held against"


def _table(*columns: str) -> Table:
    table = narrow_table()
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _difference(differences: np.ndarray) -> str:
    """`0.0210 ± 0.0040 (2 seeds) below`: mean and spread of one difference a seed."""
    mean, n = float(differences.mean()), len(differences)
    side = "below" if mean < 0 else "above"
    if n == 1:
        return f"{format_loss(abs(mean))} (one seed: no spread is known) {side}"
    spread = float(differences.std(ddof=1))
    clear = "" if abs(mean) > 2 * spread / math.sqrt(n) else ", no clear difference,"
    return f"{format_loss(abs(mean))} ± {format_loss(spread)} ({n} seeds{clear}) {side}".replace(",)", ")")


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
    for run in sorted(runs, key=seed_of):
        settings.setdefault(str([run.setting(key) for key in tuned]), []).append(run)
    seeds = max(map(len, settings.values()), default=0)
    finished = [group for group in settings.values() if len(group) == seeds]
    return min(finished, key=_mean_loss, default=[])


def _is_edge(best: Any, tried: Sequence[Any]) -> bool:
    """Whether `best` is the lowest or the highest of several numbers; no weight decay is below 0."""
    numbers = {value for value in tried if isinstance(value, int | float) and not isinstance(value, bool)}
    return len(numbers) > 1 and best in (min(numbers), max(numbers)) and best != 0


def _mean_loss(runs: Sequence[RunRecord]) -> float:
    """Infinite where a run diverged."""
    mean = math.fsum(run.outcome["val_loss"] for run in runs) / len(runs)
    return math.inf if math.isnan(mean) else mean


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
