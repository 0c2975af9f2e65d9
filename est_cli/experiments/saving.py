"""Savings at equal loss: the cost of an arm compared with what the full model needs for the same loss.

A schedule that saves FLOPs must be compared with the full model trained for fewer steps. The full model's runs, for all
tokens and for fewer steps, are the points of a frontier. Comparisons and the study use it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from est_cli.reports.records import RunRecord
from est_cli.units import format_percent

COSTS = {"flops": "flops_total", "seconds": "train_s"}
"""What can be saved, and its key in summary.json."""
AT_LEAST, AT_MOST = "at least", "at most"


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
        """The mean over seeds that were measured at the same costs; empty if one of them is empty."""
        if not frontiers or not all(len(frontier.cost) for frontier in frontiers):
            return cls.of([])
        return cls(*(np.mean([getattr(f, axis) for f in frontiers], 0) for axis in ("cost", "loss")))

    def loss_at(self, cost: float, slack: float = 0.001) -> float:
        """The full model's loss at this cost; NaN outside of what was measured.

        `slack` is the share by which a run of the same cost may differ, because steps are whole.
        """
        if not len(self.cost) or not (1 - slack) * self.cost[0] <= cost <= (1 + slack) * self.cost[-1]:
            return math.nan
        return float(np.interp(math.log(cost), np.log(self.cost), self.loss))

    def cost_at(self, loss: float) -> float:
        """The cost that the full model needs for this loss; NaN outside of what was measured."""
        if not len(self.loss) or not self.loss[-1] <= loss <= self.loss[0]:
            return math.nan
        return float(np.exp(np.interp(-loss, -self.loss, np.log(self.cost))))


def needed(frontier: Frontier, loss: float) -> tuple[float, str | None]:
    """The full model's cost for `loss`, NaN if unknown, and how a saving against that cost is bounded.

    AT_LEAST if no run of the full model has a lower loss, AT_MOST if the loss is above the shortest run's, else None.
    """
    if len(frontier.loss) and loss <= frontier.loss.min():
        return float(frontier.cost[frontier.loss.argmin()]), AT_LEAST
    if len(frontier.loss) < 2 or (np.diff(frontier.loss) >= 0).any():
        return math.nan, None
    if loss > frontier.loss[0]:
        return float(frontier.cost[0]), AT_MOST
    return frontier.cost_at(loss), None


@dataclass(frozen=True)
class Saving:
    """1 less an arm's cost over what the full model needs for the same loss; NaN if that is unknown."""

    share: float = math.nan
    bound: str | None = None
    """AT_LEAST, AT_MOST or None."""

    def words(self, less: str, what: str) -> str:
        if math.isnan(self.share):
            return f"unknown {what}"
        more = self.share < 0
        # At least a negative saving is at most that much more.
        bound = {AT_LEAST: AT_MOST, AT_MOST: AT_LEAST}[self.bound] if more and self.bound else self.bound
        return " ".join(filter(None, (bound, format_percent(abs(self.share)), "more" if more else less, what)))


@dataclass(frozen=True)
class FullModel:
    """What the full model reaches, by seed: its runs for all tokens, and with those for fewer steps its frontiers."""

    runs: dict[int, RunRecord]
    frontiers: dict[str, dict[int, Frontier]]
    """By what is spent (flops, seconds) and seed; only seeds with as many points as the best known one."""
    slack: float
    """Half a step of the shortest run: its FLOPs can miss their target by this share."""

    @classmethod
    def of(cls, full: Sequence[RunRecord], same_flops: Sequence[RunRecord]) -> "FullModel":
        by_seed = {seed_of(run): [run] for run in full}
        for run in same_flops:
            by_seed.setdefault(seed_of(run), []).append(run)
        points = max(map(len, by_seed.values()), default=0)
        frontiers = {
            key: {seed: Frontier.of(runs, cost) for seed, runs in by_seed.items() if len(runs) == points}
            for key, cost in COSTS.items()
        }
        steps = min((run.outcome["steps"] for run in (*full, *same_flops)), default=math.inf)
        return cls({seed_of(run): run for run in full}, frontiers, max(0.001, 0.51 / max(1, steps)))

    def loss(self, seed: int) -> float:
        return self.runs[seed].outcome["val_loss"] if seed in self.runs else math.nan

    def loss_at(self, seed: int, flops: float) -> float:
        """The loss for these FLOPs, linear in their logarithm between the runs; NaN outside of them."""
        frontier = self.frontiers["flops"].get(seed)
        return math.nan if frontier is None else frontier.loss_at(flops, self.slack)

    def saving(self, runs: Sequence[RunRecord], key: str) -> Saving:
        """From means over the seeds that both have."""
        seeds = [seed_of(run) for run in runs if seed_of(run) in self.runs and seed_of(run) in self.frontiers[key]]
        if not seeds:
            return Saving()
        cost, loss = (
            float(np.mean([run.outcome[name] for run in runs if seed_of(run) in seeds]))
            for name in (COSTS[key], "val_loss")
        )
        least, bound = needed(Frontier.mean([self.frontiers[key][seed] for seed in seeds]), loss)
        return Saving(1 - cost / least, bound)


def seed_of(run: RunRecord) -> int:
    return run.setting("seed")
