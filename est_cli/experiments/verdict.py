"""What a comparison says about its arms: loss, FLOPs and time, and what each saves at equal loss.

If the runs also try settings of the optimizer, every arm appears at its own best setting. A baseline at a learning rate
that suits another arm proves nothing.
"""

import math
from collections.abc import Callable, Sequence
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

_AXES = {"steps": "step", "flops": "flops/total", "seconds": "seconds"}
_FORMATS = {"steps": format_count, "flops": format_flops, "seconds": format_clock}

Values = list[float | None]
"""One value for each seed; None if it is not known."""


@dataclass(frozen=True)
class Verdict:
    arms: tuple[dict[str, Any], ...]
    """The facts of each arm, as `arm_facts` has them: those that evolve, best first, then those that do not."""
    runs: tuple[RunRecord, ...]
    """The runs of every arm at its best setting."""

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
        return cls(
            tuple(arm_facts(best[arm], full, tuned, tried[arm]) for arm in names),
            tuple(run for arm in names for run in best[arm]),
        )

    def show(self, console: Console, at_a_time: int | None = None) -> None:
        """`at_a_time`: how many runs shared the machine, if that is known."""
        names = [arm["arm"] for arm in self.arms]
        keys = list(self.arms[0].get("settings", ()))
        results = arm_table(*(short_key(key, keys) for key in keys), "seeds", "val loss", "FLOPs", "time")
        reached = arm_table("steps", "FLOPs", "time")
        for arm in self.arms:
            settings = map(format_setting, arm.get("settings", {}).values())
            columns = (("val_loss", format_loss), ("flops_total", format_flops), ("train_s", format_clock))
            means = (_mean(arm[key], form) for key, form in columns)
            results.add_row(arm["arm"], *settings, str(len(arm["seeds"])), *means)
            reached.add_row(arm["arm"], *(_mean(arm["to_baseline"][key], form) for key, form in _FORMATS.items()))
        console.print("mean ± standard deviation over seeds", style="italic")
        console.print(results)
        if keys:
            console.print(f"Every arm at the best of its values of {', '.join(keys)}.", style="dim")
        for key in keys:
            edges = [f"{a['arm']} ({format_setting(a['settings'][key])})" for a in self.arms if key in a["at_edge"]]
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
        arms = {arm["arm"]: arm for arm in self.arms}
        others = [arm for name, arm in arms.items() if name not in (FULL, FULL_SAME_FLOPS)]
        others.sort(key=lambda arm: math.inf if None in arm["val_loss"] else np.mean(arm["val_loss"]))
        return [said for arm in others if (said := _sentence(arm, arms.get(FULL), FULL_SAME_FLOPS in arms))]


def arm_facts(
    runs: Sequence[RunRecord], full: FullModel, tuned: Sequence[str], tried: Sequence[RunRecord]
) -> dict[str, Any]:
    """One arm as plain values. `runs` are those at its best setting, `tried` those at all settings, failed ones too.

    settings: the arm's best values of the keys `tuned`. to_baseline: steps, FLOPs and seconds until an evaluation was
    as low as the full model's final loss. to_full: its loss less the full model's for the same tokens; to_same_flops:
    for the same FLOPs. at_edge: the keys whose best value is the lowest or the highest that was tried.
    """

    def outcomes(key: str) -> np.ndarray:
        return np.array([run.outcome[key] for run in runs])

    loss, flops = outcomes("val_loss"), outcomes("flops_total")
    seeds = [seed_of(run) for run in runs]
    baseline = [full.loss(seed) for seed in seeds]
    reached = np.array([_first_reached(run, target) for run, target in zip(runs, baseline, strict=True)])
    same_flops = [full.loss_at(*point) for point in zip(seeds, flops, strict=True)]
    savings = {key: full.saving(runs, key) for key in COSTS}
    settings = {key: runs[0].setting(key) for key in tuned}
    at_edge = [key for key in tuned if _is_edge(settings[key], [run.setting(key) for run in tried])]
    return {
        "arm": runs[0].setting("name"),
        **({"settings": settings} if settings else {}),
        "seeds": seeds,
        "val_loss": _values(loss),
        "flops_total": _values(flops),
        "train_s": _values(outcomes("train_s")),
        "to_baseline": {key: _values(column) for key, column in zip(_AXES, reached.T, strict=True)},
        "to_full": _values(loss - baseline),
        "to_same_flops": _values(loss - same_flops),
        "saved_at_equal_loss": {
            key: {"share": None if math.isnan(saving.share) else saving.share, "bound": saving.bound}
            for key, saving in savings.items()
        },
        "lr_at_edge": "optimizer.lr" in at_edge,
        "at_edge": at_edge,
    }


def arm_table(*columns: str) -> Table:
    """A table with a row for each arm and numbers in `columns`."""
    table = narrow_table()
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _sentence(arm: dict[str, Any], full: dict[str, Any] | None, same_flops: bool) -> str | None:
    said = []
    if full is not None:
        share = 1 - np.mean(arm["flops_total"]) / np.mean(full["flops_total"])
        fewer = Saving(share).words("fewer", "FLOPs")
        said.append(f"for the same tokens {fewer}, and its loss {_to_full_model(arm['to_full'])}")
    if same_flops:
        said.append(f"for the same FLOPs its loss {_to_full_model(arm['to_same_flops'])}")
    saved = {key: Saving(**known) for key, known in arm["saved_at_equal_loss"].items() if known["share"] is not None}
    if saved:
        flops, time = (saved.get(key, Saving()) for key in COSTS)
        said.append(f"for the same loss it takes {flops.words('fewer', 'FLOPs')} and {time.words('less', 'time')}")
    return f"{arm['arm']}: {'; '.join(said)}." if said else None


def _to_full_model(differences: Values) -> str:
    """`is 0.0210 ± 0.0040 (2 seeds) below the full model's`: mean and spread of one difference a seed."""
    known = _known(differences)
    if not len(known):
        return "has no full model to compare with"
    mean, n = float(known.mean()), len(known)
    side = "below" if mean < 0 else "above"
    if n == 1:
        return f"is {format_loss(abs(mean))} (one seed: no spread is known) {side} the full model's"
    spread = float(known.std(ddof=1))
    seeds = f"({n} seeds)" if abs(mean) > 2 * spread / math.sqrt(n) else f"({n} seeds, no clear difference)"
    return f"is {format_loss(abs(mean))} ± {format_loss(spread)} {seeds} {side} the full model's"


def _first_reached(run: RunRecord, target: float) -> list[float]:
    """Steps, FLOPs and seconds at the first evaluation with at most this loss; NaN if there is none."""
    reached = np.flatnonzero(run.column("val/loss") <= target)
    if not len(reached):
        return [math.nan] * len(_AXES)
    steps, *rest = (float(run.column(axis)[reached[0]]) for axis in _AXES.values())
    return [steps + 1, *rest]


def _mean(values: Values, write: Callable[[float], str]) -> str:
    """Mean and spread, and how many seeds have a value if not all have."""
    known = _known(values)
    if not len(known):
        return "-"
    spread = f" ± {write(float(known.std(ddof=1)))}" if len(known) > 1 and known.std() > 0 else ""
    share = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{write(float(known.mean()))}{spread}{share}"


def _best_setting(runs: Sequence[RunRecord], tuned: Sequence[str]) -> list[RunRecord]:
    """The runs, by seed, of the setting with the lowest mean loss among those that most seeds have finished."""
    settings: dict[str, list[RunRecord]] = {}
    for run in sorted(runs, key=seed_of):
        settings.setdefault(str([run.setting(key) for key in tuned]), []).append(run)
    seeds = max(map(len, settings.values()))
    return min((group for group in settings.values() if len(group) == seeds), key=_mean_loss)


def _is_edge(best: Any, tried: Sequence[Any]) -> bool:
    """Whether `best` is the lowest or the highest of several numbers; 0 is no edge, as weight decay has none below."""
    numbers = {value for value in tried if isinstance(value, int | float) and not isinstance(value, bool)}
    return len(numbers) > 1 and best in (min(numbers), max(numbers)) and best != 0


def _mean_loss(runs: Sequence[RunRecord]) -> float:
    """Infinite if a run diverged."""
    mean = math.fsum(run.outcome["val_loss"] for run in runs) / len(runs)
    return math.inf if math.isnan(mean) else mean


def _values(numbers: np.ndarray) -> Values:
    return [float(number) if math.isfinite(number) else None for number in numbers]


def _known(values: Values) -> np.ndarray:
    return np.array([value for value in values if value is not None])
