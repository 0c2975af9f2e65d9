"""Curves made ready for drawing: smoothed within a stage, thinned to what a figure can show."""

from dataclasses import dataclass

import numpy as np

from est_cli.reports.axes import Axis
from est_cli.reports.records import RunRecord


@dataclass(frozen=True)
class Curve:
    """Two float64 arrays of one length, both finite."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def thinned(self, max_points: int = 500) -> "Curve":
        """At most `max_points` of its points, evenly taken, the first and the last among them."""
        if len(self) <= max_points:
            return self
        chosen = np.unique(np.linspace(0, len(self) - 1, max_points).round().astype(int))
        return Curve(self.x[chosen], self.y[chosen])


def curve(run: RunRecord, axis: Axis, key: str) -> Curve:
    """A column against an axis, where both are finite."""
    x, y = axis.values(run), run.column(key)
    finite = np.isfinite(x) & np.isfinite(y)
    return Curve(x[finite], y[finite])


def train_curve(run: RunRecord, axis: Axis) -> Curve:
    """The training loss, a running mean over about 1% of the run that never reaches across a stage boundary."""
    x, y, stage = axis.values(run), run.column("train/loss"), np.nan_to_num(run.column("stage"))
    finite = np.isfinite(x) & np.isfinite(y)
    x, y, stage = x[finite], y[finite], stage[finite]
    changes = np.flatnonzero(np.diff(stage)) + 1
    window = max(1, len(y) // 100)
    parts = [running_mean(part, window) for part in np.split(y, changes)]
    return Curve(x, np.concatenate(parts) if parts else y)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over up to `window` values on either side together; at the ends over those that are there. [n] → [n]"""
    n = len(values)
    total = np.concatenate([[0.0], np.cumsum(values)])
    half = window // 2
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    return (total[high] - total[low]) / (high - low)


def final_loss_window(runs_curves: list[Curve]) -> tuple[float, float] | None:
    """Loss limits that show the run after its first steep steps, or None where there is nothing to show.

    From scratch, a loss falls from ln(vocabulary) to half of it in its first percents: a frame around all of it
    leaves no room for the differences that people look for.
    """
    shown = [c for c in runs_curves if len(c)]
    if not shown:
        return None
    low = min(float(c.y.min()) for c in shown)
    longest = max(float(c.x[-1]) for c in shown)
    late = [float(c.y[c.x >= 0.08 * longest].max()) for c in shown if (c.x >= 0.08 * longest).any()]
    high = max(late, default=max(float(c.y.max()) for c in shown))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
