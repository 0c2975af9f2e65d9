"""What a loss curve can be drawn against: optimizer steps, tokens, FLOPs or seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from est_cli.reports.arms import Comparison
from est_cli.reports.records import RunRecord
from est_cli.units import si_prefix


@dataclass(frozen=True)
class Axis:
    key: str
    title: str
    column: str

    def values(self, run: RunRecord) -> np.ndarray:
        """float64 [rows]: how much of it the run had spent after each logged update."""
        return run.column(self.column) + (self.key == "steps")

    def at_step(self, run: RunRecord, step: int) -> float:
        """How much of it the run had spent after its first `step` updates."""
        done, spent = run.column("step") + 1, self.values(run)
        known = np.isfinite(spent)
        return float(np.interp(step, np.append(0, done[known]), np.append(0, spent[known])))

    def unit(self, runs: Sequence[RunRecord]) -> tuple[float, str]:
        """The factor to divide by, and the axis label with the unit."""
        largest = max(
            (float(np.nanmax(values)) for values in map(self.values, runs) if np.isfinite(values).any()), default=0.0
        )
        if self.key == "seconds":
            scale, word = next(
                (pair for pair in ((86400 * 3, "days"), (7200, "hours"), (180, "minutes")) if largest >= pair[0]),
                (1, "seconds"),
            )
            return float({"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}[word]), f"{self.title} ({word})"
        scale, letter = si_prefix(min(largest, 1e9) if self.key == "tokens" else largest)
        if self.key == "flops":
            return scale, f"{self.title} ({letter}FLOP)"
        if self.key == "steps" and largest < 1e5:
            return 1.0, self.title
        word = {"k": "thousands", "M": "millions", "G": "billions"}.get(letter)
        return scale, f"{self.title} ({word})" if word else self.title


AXES = (
    Axis("steps", "Optimizer steps", "step"),
    Axis("tokens", "Tokens", "tokens"),
    Axis("flops", "Training compute", "flops/total"),
    Axis("seconds", "Training time", "seconds"),
)


def known_axes(comparison: Comparison) -> list[Axis]:
    """The axes that at least one run has values on."""
    return [axis for axis in AXES if any(np.isfinite(axis.values(run)).any() for run in comparison.runs)]


def run_with_shared_stages(comparison: Comparison, axis: Axis) -> RunRecord | None:
    """The run that is furthest, if all staged runs have its rates and start its stages where it does (to 1%).

    None where no run has stages, or they disagree: then they cannot be one set of bands.
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
