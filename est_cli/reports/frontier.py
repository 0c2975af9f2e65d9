"""What the full model reaches for any compute: the measure of every schedule.

A schedule that saves FLOPs must be held against the full model that simply trains for fewer steps, with a learning-rate
schedule of its own; between such runs the loss is taken as linear in the logarithm of the FLOPs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from est_cli.reports.records import RunRecord


@dataclass(frozen=True)
class Frontier:
    """Whole-model FLOPs, ascending, and the final validation losses of the full model. [n] each

    With another `cost` these are not FLOPs, but what that is in: seconds.
    """

    flops: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[RunRecord], cost: str = "flops_total") -> "Frontier":
        """`cost`: the key of summary.json that is spent."""
        points = sorted((run.outcome[cost], run.outcome["val_loss"]) for run in runs)
        return cls(*np.array(points).reshape(-1, 2).T)

    @classmethod
    def mean(cls, frontiers: Sequence["Frontier"]) -> "Frontier":
        """Of several seeds, measured at the same FLOPs; empty where one of them is."""
        if not frontiers or not all(len(frontier.flops) for frontier in frontiers):
            return cls.of([])
        return cls(*(np.mean([getattr(f, axis) for f in frontiers], 0) for axis in ("flops", "loss")))

    def loss_at(self, flops: float, slack: float = 0.001) -> float:
        """The full model's loss for so much compute; NaN outside of what was measured.

        `slack`: the share by which a run of the same FLOPs may differ, since its steps are whole.
        """
        if not len(self.flops) or not (1 - slack) * self.flops[0] <= flops <= (1 + slack) * self.flops[-1]:
            return math.nan
        return float(np.interp(math.log(flops), np.log(self.flops), self.loss))

    def flops_at(self, loss: float) -> float:
        """The compute that the full model needs for this loss; NaN outside of what was measured."""
        if not len(self.loss) or not self.loss[-1] <= loss <= self.loss[0]:
            return math.nan
        return float(np.exp(np.interp(-loss, -self.loss, np.log(self.flops))))
