"""Curves ready for drawing: a column against steps, tokens, FLOPs or seconds, thinned; and where stages lie there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from est_cli.reports.records import RunRecord, evenly
from est_cli.units import si_prefix

_AXES = {
    "steps": ("Optimizer steps", "step"),
    "tokens": ("Tokens", "tokens"),
    "flops": ("Training compute", "flops/total"),
    "seconds": ("Training time", "seconds"),
}
"""Title and column of what a loss can be drawn against."""
_TIME_UNITS = (("days", 86400, 3), ("hours", 3600, 2), ("minutes", 60, 3), ("seconds", 1, 0))
"""Name, seconds, and how many of them a run must reach to be shown in this unit."""


@dataclass(frozen=True)
class Axis:
    """What a loss is drawn against, in a unit that suits the runs."""

    key: str
    """steps, tokens, flops or seconds."""
    title: str
    label: str
    """The title with the unit."""
    scale: float
    """Steps, tokens, FLOPs or seconds in one unit."""

    @classmethod
    def of(cls, key: str, runs: Sequence[RunRecord]) -> "Axis":
        title, _ = _AXES[key]
        spent = np.concatenate([_spent(run, key) for run in runs])
        largest = float(np.max(spent, where=np.isfinite(spent), initial=0.0))
        if key == "seconds":
            word, scale = next((name, float(size)) for name, size, least in _TIME_UNITS if largest >= size * least)
        elif key == "steps" and largest < 1e5:
            word, scale = "", 1.0
        else:
            scale, letter = si_prefix(min(largest, 1e9) if key == "tokens" else largest)
            words = {"k": "thousands", "M": "millions", "G": "billions"}
            word = f"{letter}FLOP" if key == "flops" else words.get(letter)
        return cls(key, title, f"{title} ({word})" if word else title, scale)

    def values(self, run: RunRecord) -> np.ndarray:
        """float64 [rows]: what the run had spent after each logged update."""
        return _spent(run, self.key) / self.scale

    def at_step(self, run: RunRecord, step: int) -> float:
        """What the run had spent after its first `step` updates."""
        done, spent = run.column("step") + 1, self.values(run)
        known = np.isfinite(spent)
        return float(np.interp(step, np.append(0, done[known]), np.append(0, spent[known])))


def _spent(run: RunRecord, key: str) -> np.ndarray:
    return run.column(_AXES[key][1]) + (key == "steps")


def known_axes(runs: Sequence[RunRecord]) -> list[Axis]:
    """The axes on which at least one run has values."""
    return [Axis.of(key, runs) for key in _AXES if any(np.isfinite(_spent(run, key)).any() for run in runs)]


def run_with_shared_stages(runs: Sequence[RunRecord], axis: Axis) -> RunRecord | None:
    """The run that is furthest, if all staged runs have its rates and start their stages where it does, within 1%.

    None if no run has stages or they disagree: then they cannot be drawn as one set of bands.
    """
    staged = [run for run in runs if len(run.stages) > 1 and run.n_rows]
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

    @classmethod
    def of(cls, run: RunRecord, axis: Axis, key: str) -> "Curve":
        """A column against an axis, where both are finite."""
        x, y = axis.values(run), run.column(key)
        finite = np.isfinite(x) & np.isfinite(y)
        return cls(x[finite], y[finite])

    def __len__(self) -> int:
        return len(self.x)

    def thinned(self, max_points: int = 500) -> "Curve":
        chosen = evenly(len(self), max_points)
        return Curve(self.x[chosen], self.y[chosen])


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
    high = float(np.concatenate([c.y[c.x >= 0.08 * longest] for c in shown]).max())
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
