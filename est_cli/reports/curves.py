"""Curves ready for drawing: a column against steps, tokens, FLOPs or seconds; smoothed within a stage, thinned."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from est_cli.reports.comparison import Comparison
from est_cli.reports.records import RunRecord
from est_cli.units import si_prefix

_TIME_UNITS = (("days", 86400, 3), ("hours", 3600, 2), ("minutes", 60, 3))
"""Name, seconds, and how many of them a run must reach to be shown in this unit."""


@dataclass(frozen=True)
class Axis:
    """What a loss can be drawn against."""

    key: str
    title: str
    column: str

    def values(self, run: RunRecord) -> np.ndarray:
        """float64 [rows]: what the run had spent after each logged update."""
        return run.column(self.column) + (self.key == "steps")

    def at_step(self, run: RunRecord, step: int) -> float:
        """What the run had spent after its first `step` updates."""
        done, spent = run.column("step") + 1, self.values(run)
        known = np.isfinite(spent)
        return float(np.interp(step, np.append(0, done[known]), np.append(0, spent[known])))

    def unit(self, runs: Sequence[RunRecord]) -> tuple[float, str]:
        """The factor to divide by, and the axis label with the unit."""
        spent = np.concatenate([self.values(run) for run in runs])
        largest = float(np.max(spent, where=np.isfinite(spent), initial=0.0))
        if self.key == "seconds":
            units = (unit for unit in _TIME_UNITS if largest >= unit[1] * unit[2])
            word, seconds, _ = next(units, ("seconds", 1, 0))
            return float(seconds), f"{self.title} ({word})"
        scale, letter = si_prefix(min(largest, 1e9) if self.key == "tokens" else largest)
        if self.key == "flops":
            return scale, f"{self.title} ({letter}FLOP)"
        if self.key == "steps" and largest < 1e5:
            return 1.0, self.title
        word = {"k": "thousands", "M": "millions", "G": "billions"}.get(letter)
        return scale, f"{self.title} ({word})" if word else self.title


STEPS = Axis("steps", "Optimizer steps", "step")
TOKENS = Axis("tokens", "Tokens", "tokens")
FLOPS = Axis("flops", "Training compute", "flops/total")
SECONDS = Axis("seconds", "Training time", "seconds")
AXES = (STEPS, TOKENS, FLOPS, SECONDS)


def known_axes(comparison: Comparison) -> list[Axis]:
    """The axes on which at least one run has values."""
    return [axis for axis in AXES if any(np.isfinite(axis.values(run)).any() for run in comparison.runs)]


def run_with_shared_stages(comparison: Comparison, axis: Axis) -> RunRecord | None:
    """The run that is furthest, if all staged runs have its rates and start their stages where it does, within 1%.

    None if no run has stages or they disagree: then they cannot be drawn as one set of bands.
    """
    staged = [run for run in comparison.runs if len(run.stages) > 1 and run.n_rows]
    if not staged or len({tuple(stage.kept for stage in run.stages) for run in staged}) > 1:
        return None
    furthest = max(staged, key=lambda run: run.steps_done)
    tolerance = 0.01 * axis.at_step(furthest, furthest.steps_done)
    agree = all(
        abs(axis.at_step(run, stage.first_step) - axis.at_step(furthest, other.first_step)) <= tolerance
        for run in staged
        for stage, other in zip(run.stages, furthest.stages, strict=True)
        if stage.first_step < run.steps_done
    )
    return furthest if agree else None


@dataclass(frozen=True)
class Curve:
    """Two float64 arrays of one length, both finite."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def thinned(self, max_points: int = 500) -> "Curve":
        """At most `max_points` of its points, evenly taken, with the first and the last."""
        if len(self) <= max_points:
            return self
        chosen = np.unique(np.linspace(0, len(self) - 1, max_points).round().astype(int))
        return Curve(self.x[chosen], self.y[chosen])


def curve(run: RunRecord, axis: Axis, key: str, scale: float = 1.0) -> Curve:
    """A column against an axis, divided by `scale`, where both are finite."""
    x, y = axis.values(run), run.column(key)
    finite = np.isfinite(x) & np.isfinite(y)
    return Curve(x[finite] / scale, y[finite])


def train_curve(run: RunRecord, axis: Axis, scale: float = 1.0) -> Curve:
    """The training loss, a running mean over about 1% of the run that never crosses a stage boundary."""
    x, y = axis.values(run), run.column("train/loss")
    finite = np.isfinite(x) & np.isfinite(y)
    x, y, stage = x[finite] / scale, y[finite], np.nan_to_num(run.column("stage"))[finite]
    window = max(1, len(y) // 100)
    parts = np.split(y, np.flatnonzero(np.diff(stage)) + 1)
    return Curve(x, np.concatenate([running_mean(part, window) for part in parts]))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over up to `window` values around each value; over fewer at the ends. [n] → [n]"""
    n, half = len(values), window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    return (total[high] - total[low]) / (high - low)


def final_loss_window(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Loss limits that show the run after its first steep steps, or None if there is nothing to show.

    From scratch, a loss falls from ln(vocabulary) to half of it in the first percents of a run. A frame around all of
    it would leave no room for the differences that people look for.
    """
    shown = [c for c in curves if len(c)]
    if not shown:
        return None
    low = min(float(c.y.min()) for c in shown)
    longest = max(float(c.x[-1]) for c in shown)
    late = [float(c.y[c.x >= 0.08 * longest].max()) for c in shown if (c.x >= 0.08 * longest).any()]
    high = max(late, default=max(float(c.y.max()) for c in shown))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
