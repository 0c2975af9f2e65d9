"""What the records say: every schedule beside the full model of its own seed, and against the full model's frontier."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from est_cli.experiments.saving import AT_LEAST, AT_MOST, Frontier, FullModel, MeasuredArm, seed_of
from est_cli.files import read_json
from est_cli.reports.records import RunRecord
from est_cli.subnet.memory import count_parameters
from study.grid import ARMS, SEEDS, SHORT, SIZES, WARMUP, WINNER, Arm, Run, runs_with
from study.records import Records, read_record_config


@dataclass(frozen=True)
class Result(MeasuredArm):
    """The finished seeds of one schedule beside the full model. Shares and savings are NaN where they are not known."""

    step_s: Sequence[float]
    """Measured seconds of a step in each stage, the full model's last; empty where they were not measured."""

    @property
    def differences(self) -> np.ndarray:
        """Its losses less the full model's for the same tokens, of the seeds that have both."""
        return self.to_full[np.isfinite(self.to_full)]

    @property
    def saved(self) -> float:
        """Share of the FLOPs that the full model needs for the mean loss."""
        saving = self.saving("flops")
        return math.nan if saving.bound == AT_MOST else saving.share

    @property
    def at_least(self) -> bool:
        """Whether the mean loss is below the full model's for the same tokens: `saved` is then counted against that."""
        return self.saving("flops").bound == AT_LEAST

    @property
    def seconds_saved(self) -> float:
        """`saved` in seconds of measured steps, without evaluations."""
        full_needs = self.share / (1 - self.saved)
        ours, full = _seconds(self.runs, self.step_s), _seconds(list(self.full.runs.values()), self.step_s[-1:])
        return 1 - ours / (full * full_needs)


def result_of(records: Records, runs: list[Run]) -> Result:
    """The result of `runs`: the seeds of one arm at one size and number of steps."""
    done = [run for run in runs if run in records]
    full = records.of([run.held_against[0] for run in done if run.held_against])
    frontiers = {run.seed: frontier for run in done if len((frontier := frontier_of(records, run)).loss)}
    # Everything that doubles has stages of the same depths.
    timed = WINNER if runs[0].arm.name.startswith(WINNER) else runs[0].arm.name
    step_s = times_of(records).get(runs[0].size, {}).get(timed, [])
    reached = FullModel({seed_of(run): run for run in full}, {"flops": frontiers}, slack=0.001)
    return Result(records.of(done), reached, step_s)


def headline(records: Records, size: str, group: str = "headline") -> dict[Arm, Result]:
    """The arms of the headline; group "short" is the same with less warmup."""
    arms = dict.fromkeys(run.arm for run in runs_with(group=group, size=size))
    return {arm: result_of(records, runs_with(group=group, size=size, arm=arm)) for arm in arms}


def at_first_seed(arm: Arm, size: str, warmup: int = SHORT) -> list[Run]:
    """The runs of an arm at one seed and its full length: one for every learning rate that is asked for."""
    runs = runs_with(arm=arm, size=size, seed=SEEDS[0], warmup=warmup)
    return [run for run in runs if run.group not in ("length", "length-lr")]


def screened(records: Records, size: str, warmup: int = SHORT) -> list[tuple[Run, Result]]:
    """Every schedule at one seed and the best of its learning rates; what saves most at equal loss comes first."""
    schedules = [arm for arm in ARMS.values() if not arm.is_full]
    done = [[run for run in at_first_seed(arm, size, warmup) if run in records] for arm in schedules]
    best = [min(runs, key=records.loss) for runs in done if runs]

    def rank(entry: tuple[Run, Result]) -> list[float]:
        result = entry[1]
        return [math.inf if math.isnan(key) else key for key in (-result.saved, result.to_same_flops.mean())]

    return sorted(((run, result_of(records, [run])) for run in best), key=rank)


def frontier_of(records: Records, run: Run) -> Frontier:
    """The full model that `run` is held against; empty if one of its two runs is missing."""
    done = records.of(run.held_against)
    return Frontier.of(done if len(done) == 2 else [])


def times_of(records: Records) -> dict[str, Any]:
    """What study/times.py measured: by size and arm the seconds of a step in each stage, the full model's last."""
    return read_json(records.folder.parent / "times.json")


def parameters(run: RunRecord) -> int:
    return count_parameters(read_record_config(run.config).model).total


def headline_json(records: Records) -> dict[str, Any]:
    """The winner in numbers. Those at the top are of the size that most seeds are done of, the larger one if equal."""
    sizes = [_size_json(runs[0], result) for runs, result in winners(records) if len(result.differences)]
    tuned = [entry for entry in sizes if entry["warmup"] == WARMUP[entry["size"]]]
    main = max(reversed(tuned or sizes), key=lambda entry: entry["seeds"], default={})
    return {"schedule": ARMS[WINNER].says, "overrides": list(ARMS[WINNER].overrides), **main, "sizes": sizes}


def winners(records: Records) -> list[tuple[list[Run], Result]]:
    """The seeds and the result of the winner at every size and length, with the headline's warmup and with less."""
    found: dict[tuple[str, int, int], list[Run]] = {}
    for group in ("headline", "short", "length"):
        for run in runs_with(group=group, arm=ARMS[WINNER]):
            found.setdefault((run.size, run.steps, run.warmup), []).append(run)
    return [(runs, result_of(records, runs)) for runs in found.values()]


def _size_json(first: Run, result: Result) -> dict[str, Any]:
    layers, width, _ = SIZES[first.size]
    run, differences = result.runs[0], result.differences
    n_parameters, tokens = parameters(run), int(run.outcome["tokens"])
    numbers = {
        "tokens_per_parameter": tokens / n_parameters,
        "difference": differences.mean(),
        "spread": np.std(differences, ddof=1) if len(differences) > 1 else math.nan,
        "saved": 1 - result.share,
        "saved_at_equal_loss": result.saved,
        "seconds_saved": result.seconds_saved,
    }
    model = {"n_layers": layers, "d_model": width, "params": n_parameters, "tokens": tokens}
    return {
        **{"size": first.size, "warmup": first.warmup, **model},
        **{key: round(float(value), 6) if math.isfinite(value) else None for key, value in numbers.items()},
        **{"at_least": result.at_least, "seeds": len(differences)},
    }


def _seconds(runs: Sequence[RunRecord], step_s: Sequence[float]) -> float:
    """Seconds of one run's steps; NaN if there is no run or a stage was not measured."""
    stages = runs[0].summary["stages"] if runs else []
    if not stages or len(stages) > len(step_s):
        return math.nan
    return sum((s["last_step"] - s["first_step"] + 1) * t for s, t in zip(stages, step_s, strict=False))
