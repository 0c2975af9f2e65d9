"""The schedule: which rates hold at which optimizer step.

A schedule is a list of stages. A stage gives its exclusive `end` (an int is a step, a float a fraction of
the run: floor(f·T + 0.5), null the end of training) and the three rates. Named schedules and people's own
functions only write such a list.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from est_cli.schema import Within

Rate = Annotated[float, Within(0, 1, open_low=True)]
Boundary = Annotated[int, Within(1)] | Annotated[float, Within(0, 1, open_low=True)]

_LARGEST_MAX_STEPS_TRIED = 20_000
_LARGEST_FRACTION = 2**63
_MOST_STAGES = 1000


@dataclass(frozen=True)
class Rates:
    """p_H, p_M and p_L of the paper's section 3: the fractions of heads, neurons and layers that are kept."""

    heads: Rate = 1.0
    mlp: Rate = 1.0
    layers: Rate = 1.0


@dataclass(frozen=True)
class StageSpec:
    """A stage as a person writes it."""

    end: Boundary | None = None
    heads: Rate = 1.0
    mlp: Rate = 1.0
    layers: Rate = 1.0

    @property
    def rates(self) -> Rates:
        return Rates(self.heads, self.mlp, self.layers)


@dataclass(frozen=True)
class Stage:
    """Optimizer steps `first_step` … `end` − 1 train subnetworks of these rates."""

    number: int
    first_step: int
    end: int
    rates: Rates

    @property
    def last_step(self) -> int:
        return self.end - 1

    @property
    def steps(self) -> int:
        return self.end - self.first_step


def boundary_step(boundary: int | float | None, max_steps: int) -> int:
    """The step at which a boundary lies: an int is a step, a float a fraction of `max_steps`."""
    if boundary is None:
        return max_steps
    return math.floor(boundary * max_steps + 0.5) if isinstance(boundary, float) else boundary


def build_stages(specs: Sequence[StageSpec], max_steps: int, names: Sequence[str] | None = None) -> tuple[Stage, ...]:
    """The stages of a run of `max_steps` optimizer steps.

    `names` are the config keys of the boundaries, for messages.

    Raises ValueError where a stage would be empty or reversed, naming the boundary, the step and the
    smallest `max_steps` that would work.
    """
    names = names or [f"scheduler.stages[{i}].end" for i in range(len(specs))]
    ends = [boundary_step(spec.end, max_steps) for spec in specs]
    if not ends:
        raise ValueError("scheduler.stages=[]: must name at least one stage")
    previous = 0
    for index, end in enumerate(ends):
        last = index == len(ends) - 1
        if last and end != max_steps:
            raise ValueError(
                f"{names[index]}={specs[index].end}: the last stage must end with the training at "
                f"step {max_steps}; leave its end out, or add a last stage without one"
            )
        if end <= previous or (not last and end >= max_steps):
            raise ValueError(_explain_empty(specs, max_steps, names, index, previous, end))
        previous = end
    starts = [0, *ends[:-1]]
    return tuple(
        Stage(i + 1, start, end, spec.rates)
        for i, (start, end, spec) in enumerate(zip(starts, ends, specs, strict=True))
    )


def _explain_empty(specs, max_steps: int, names, index: int, previous: int, end: int) -> str:
    where = f"{names[index]}={specs[index].end} is step {end}"
    if index < len(specs) - 1 and end >= max_steps:
        problem = (
            f"{where}, but training ends at step {max_steps} (trainer.max_steps): stage {index + 2} would be empty"
        )
    else:
        before = (
            f"{names[index - 1]}={specs[index - 1].end} is step {previous}" if index else "training starts at step 0"
        )
        if specs[index].end is None:
            where = f"training ends at step {end} (trainer.max_steps)"
        kind = "empty" if end == previous else "reversed"
        problem = f"{where}, but {before}: stage {index + 1} would be {kind}"
    smallest = smallest_max_steps(specs)
    advice = (
        f"the smallest trainer.max_steps that works is {smallest}"
        if smallest
        else "no trainer.max_steps makes these boundaries increase"
    )
    return f"{problem}; {advice}"


def smallest_max_steps(specs: Sequence[StageSpec]) -> int | None:
    """The smallest run length at which no stage is empty, or None where there is none to be found."""
    # The last stage ends with the training, all others before it.
    last = len(specs) - 1
    floor = max([len(specs), *(spec.end + (i < last) for i, spec in enumerate(specs) if isinstance(spec.end, int))])
    for index, spec in enumerate(specs):
        if isinstance(spec.end, float):
            # The boundary after index + 1 stages lies at that step at least.
            floor = max(floor, (index + 0.5) / max(spec.end, 1 / _LARGEST_FRACTION))
    floor = math.floor(floor)
    for earlier, later in itertools.combinations(specs, 2):
        if isinstance(earlier.end, float) and isinstance(later.end, float) and earlier.end >= later.end:
            return None
        if isinstance(earlier.end, int) and isinstance(later.end, float):
            # A fraction that follows a step must round to more than it.
            floor = max(floor, math.floor((earlier.end + 0.5) / max(later.end, 1 / _LARGEST_FRACTION)))
    for max_steps in range(floor, floor + _LARGEST_MAX_STEPS_TRIED):
        ends = [0, *(boundary_step(spec.end, max_steps) for spec in specs)]
        if all(a < b for a, b in itertools.pairwise(ends)) and ends[-1] == max_steps:
            return max_steps
    return None


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that optimizer step `step` (from 0) belongs to."""
    return next(stage for stage in stages if step < stage.end)


def ramp(rates: Rates, n_stages: int = 4) -> list[StageSpec]:
    """Rates that rise from `rates` to 1 in `n_stages` equal stages; the last one trains the full model."""
    if type(n_stages) is not int or not 1 <= n_stages <= _MOST_STAGES:
        raise ValueError(f"scheduler.n_stages={n_stages}: must be an integer of at least 1 and at most {_MOST_STAGES}")

    def rate(low: float, i: int) -> float:
        return 1.0 if i == n_stages - 1 else low + (1.0 - low) * i / (n_stages - 1)

    return [
        StageSpec(
            None if i == n_stages - 1 else (i + 1) / n_stages,
            rate(rates.heads, i),
            rate(rates.mlp, i),
            rate(rates.layers, i),
        )
        for i in range(n_stages)
    ]


NAMED_SCHEDULES = {"ramp": ramp}
