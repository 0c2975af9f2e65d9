"""An arm's runs beside the full model's: its loss for the same tokens and FLOPs, and what it saves at equal loss.

A schedule that saves FLOPs must be compared with the full model trained for fewer steps. The full model's runs, for all
tokens and for fewer steps, are the points of a frontier. Comparisons and the study use it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from est_cli.reports.records import RunRecord
from est_cli.units import UNKNOWN, format_percent

COSTS = {"flops": "flops_total", "seconds": "train_s"}
"""What can be saved, and its key in summary.json."""
AT_LEAST, AT_MOST = "at least", "at most"


@dataclass(frozen=True)
class Saving:
    """1 − (an arm's cost ÷ the full model's cost for the same loss); NaN if unknown."""

    share: float = math.nan
    bound: str | None = None
    """AT_LEAST if the full model never has so low a loss, AT_MOST if its shortest run has a lower one, else None."""

    def words(self, less: str, what: str) -> str:
        if math.isnan(self.share):
            return f"unknown {what}"
        more = self.share < 0
        # To save at least -10% is to spend at most 10% more.
        bound = {AT_LEAST: AT_MOST, AT_MOST: AT_LEAST}[self.bound] if more and self.bound else self.bound
        return " ".join(filter(None, (bound, format_percent(abs(self.share)), "more" if more else less, what)))


@dataclass(frozen=True)
class Frontier:
    """What the full model reaches at any cost: final losses of runs of different lengths.

    Each run has its own learning-rate schedule. Between two runs the loss is taken as linear in the logarithm of the
    cost.
    """

    cost: np.ndarray
    """[n] whole-model FLOPs or seconds, ascending."""
    loss: np.ndarray
    """[n] final validation losses."""

    @classmethod
    def of(cls, runs: Sequence[RunRecord], cost: str = "flops_total") -> "Frontier":
        """`cost` is the key of summary.json that is spent."""
        points = sorted((run.outcome[cost], run.outcome["val_loss"]) for run in runs)
        return cls(*np.array(points).reshape(-1, 2).T)

    @classmethod
    def mean(cls, frontiers: Sequence["Frontier"]) -> "Frontier":
        """The mean over seeds that were measured at the same costs; empty if there is none."""
        if not frontiers:
            return cls.of([])
        return cls(*(np.mean([getattr(f, axis) for f in frontiers], 0) for axis in ("cost", "loss")))

    def loss_at(self, cost: float, slack: float) -> float:
        """The full model's loss at this cost; NaN outside of what was measured.

        `slack` is the share by which a run of the same cost may differ, because steps are whole.
        """
        if not len(self.cost) or not (1 - slack) * self.cost[0] <= cost <= (1 + slack) * self.cost[-1]:
            return math.nan
        return float(np.interp(math.log(cost), np.log(self.cost), self.loss))

    def saving(self, cost: float, loss: float) -> Saving:
        """What a run saves that reaches `loss` at `cost`; unknown unless more steps make the full model better."""
        if len(self.loss) and loss <= self.loss.min():
            return Saving(1 - cost / float(self.cost[self.loss.argmin()]), AT_LEAST)
        if len(self.loss) < 2 or not (np.diff(self.loss) < 0).all():
            return Saving()
        if loss > self.loss[0]:
            return Saving(1 - cost / float(self.cost[0]), AT_MOST)
        return Saving(1 - cost / float(np.exp(np.interp(-loss, -self.loss, np.log(self.cost)))))


@dataclass(frozen=True)
class FullModel:
    """What the full model reaches, by seed: its runs for all tokens, and with those for fewer steps its frontiers."""

    runs: dict[int, RunRecord]
    frontiers: dict[str, dict[int, Frontier]]
    """By what is spent (flops, seconds) and seed; only seeds with as many points as the best known one."""
    slack: float
    """Half a step of the shortest run: its FLOPs can miss their target by this share."""

    @classmethod
    def of(cls, full: Sequence[RunRecord], shorter: Sequence[RunRecord]) -> "FullModel":
        by_seed: dict[int, list[RunRecord]] = {}
        for run in (*full, *shorter):
            by_seed.setdefault(seed_of(run), []).append(run)
        points = max(map(len, by_seed.values()), default=0)
        frontiers = {
            key: {seed: Frontier.of(runs, cost) for seed, runs in by_seed.items() if len(runs) == points}
            for key, cost in COSTS.items()
        }
        steps = min((run.outcome["steps"] for run in (*full, *shorter)), default=math.inf)
        return cls({seed_of(run): run for run in full}, frontiers, max(0.001, 0.51 / max(1, steps)))


@dataclass(frozen=True)
class MeasuredArm:
    """One arm at one setting: its runs, one for each seed, beside the full model of the same seeds."""

    runs: Sequence[RunRecord]
    full: FullModel

    @property
    def seeds(self) -> list[int]:
        return list(map(seed_of, self.runs))

    def outcomes(self, key: str) -> np.ndarray:
        """[seeds] One of summary.json's numbers."""
        return np.array([run.outcome[key] for run in self.runs])

    @property
    def losses(self) -> np.ndarray:
        return self.outcomes("val_loss")

    @property
    def share(self) -> float:
        """Its FLOPs as a share of the full model's for the same tokens; NaN if unknown."""
        full = [run.outcome["flops_total"] for run in self.full.runs.values()]
        return float(self.outcomes("flops_total").mean() / np.mean(full)) if self.runs and full else math.nan

    @property
    def full_losses(self) -> np.ndarray:
        """[seeds] The full model's final losses; NaN if unknown."""
        known = self.full.runs
        return np.array([known[seed].outcome["val_loss"] if seed in known else math.nan for seed in self.seeds])

    @property
    def to_full(self) -> np.ndarray:
        """[seeds] Its loss less the full model's for the same tokens; NaN if unknown."""
        return self.losses - self.full_losses

    @property
    def to_same_flops(self) -> np.ndarray:
        """[seeds] Its loss less the full model's for the same FLOPs; NaN if unknown."""
        frontiers, unknown = self.full.frontiers["flops"], Frontier.of([])
        points = zip(self.seeds, self.outcomes("flops_total"), strict=True)
        same = [frontiers.get(seed, unknown).loss_at(flops, self.full.slack) for seed, flops in points]
        return self.losses - same

    def saving(self, cost: str) -> Saving:
        """From means over the seeds that the full model has too. `cost` is a key of COSTS."""
        frontiers = self.full.frontiers[cost]
        paired = [run for run in self.runs if seed_of(run) in self.full.runs and seed_of(run) in frontiers]
        if not paired:
            return Saving()
        spent, loss = (float(np.mean([run.outcome[key] for run in paired])) for key in (COSTS[cost], "val_loss"))
        return Frontier.mean([frontiers[seed_of(run)] for run in paired]).saving(spent, loss)


def over_seeds(values: np.ndarray, write: Callable[[float], str]) -> str:
    """`2.2782 ± 0.0031`: mean and spread; `(2 of 3)` if not all values are known, a dash if none is."""
    known = values[np.isfinite(values)]
    if not len(known):
        return UNKNOWN
    spread = f" ± {write(float(known.std(ddof=1))).removeprefix('+')}" if len(known) > 1 and known.std() > 0 else ""
    share = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{write(float(known.mean()))}{spread}{share}"


def is_clear(differences: np.ndarray) -> bool:
    """Whether the mean over seeds differs from 0 by more than two standard errors. There are at least two values."""
    return abs(differences.mean()) > 2 * differences.std(ddof=1) / math.sqrt(len(differences))


def seed_of(run: RunRecord) -> int:
    return run.setting("seed")
