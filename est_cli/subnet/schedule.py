"""The schedule: which rates each optimizer step samples at, and how much of the model has joined by then.

A schedule is a list of stages. A stage gives its exclusive `end` (an int is a step, a float a fraction of
the run: floor(f·T + 0.5), null the end of training), the three rates at which it samples, and the part of the
model that it samples from. Named schedules and users' own functions only return such a list.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from est_cli.errors import UserError
from est_cli.plugins import named_function
from est_cli.schema import Within

if TYPE_CHECKING:
    from est_cli.config import ModelConfig

Rate = Annotated[float, Within(0, 1, open_low=True)]
Boundary = Annotated[int, Within(1)] | Annotated[float, Within(0, 1, open_low=True)]
Part = Annotated[int, Within(0)] | Rate
"""How much of something has joined the model: an int counts units, a float is a fraction of them."""

_RUN_LENGTHS_TRIED = 20_000
_SMALLEST_FRACTION = 2.0**-63
_MOST_STAGES = 1000


@dataclass(frozen=True)
class Rates:
    """p_H, p_M and p_L of the paper's section 3: the fractions of heads, neurons and layers that are kept."""

    heads: Rate = 1.0
    mlp: Rate = 1.0
    layers: Rate = 1.0


@dataclass(frozen=True)
class Grown:
    """The part of the model that has joined: its first layers, heads and neurons. None means all of them."""

    n_layers: Part | None = None
    n_heads: Part | None = None
    d_ff: Part | None = None

    def fractions(self, model: Mapping[str, int]) -> "Grown":
        """The same with fractions of `model`'s counts, and None where all have joined. Raises for what is no number."""
        parts = {key: part / model[key] if type(part) is int else part for key, part in vars(self).items()}
        return Grown(**{key: None if part in (None, 1.0) else float(part) for key, part in parts.items()})

    def sizes(self, model: "ModelConfig", mlp_block: int = 1) -> dict[str, int]:
        """Layers, heads, key/value heads and neurons that have joined: whole groups of heads and blocks of neurons.

        Raises ValueError, beginning with the name of the field, for counts that the model does not have.
        """
        group = model.n_heads // model.n_kv_heads
        groups = _joined("n_heads", self.n_heads, model.n_heads, group)
        return {
            "n_layers": _joined("n_layers", self.n_layers, model.n_layers, smallest=0),
            "n_heads": groups * group,
            "n_kv_heads": groups,
            "d_ff": _joined("d_ff", self.d_ff, model.d_ff, mlp_block) * mlp_block,
        }


def keep(rate: float, total: int) -> int:
    """How many of `total` units a rate in (0, 1] keeps: max(1, floor(rate·total + 0.5)), and 0 of 0."""
    return min(total, max(1, math.floor(rate * total + 0.5)))


def _joined(name: str, part: Part | None, total: int, unit: int = 1, smallest: int = 1) -> int:
    """How many groups of `unit` neighbours have joined: groups of heads, blocks of neurons, or single layers."""
    if part is None:
        return total // unit
    if isinstance(part, float):
        return keep(part, total // unit)
    if not smallest * unit <= part <= total or part % unit:
        multiple = f" and a multiple of {unit}" if unit > 1 else ""
        raise ValueError(f"{name}={part}: must be in [{smallest * unit}, {total}]{multiple}, or a fraction in (0, 1]")
    return part // unit


@dataclass(frozen=True)
class StageSpec:
    """A stage as the config has it: the rates are fractions of what has joined."""

    end: Boundary | None = None
    heads: Rate = 1.0
    mlp: Rate = 1.0
    layers: Rate = 1.0
    n_layers: Part | None = None
    n_heads: Part | None = None
    d_ff: Part | None = None

    @property
    def rates(self) -> Rates:
        return Rates(self.heads, self.mlp, self.layers)

    @property
    def grown(self) -> Grown:
        return Grown(self.n_layers, self.n_heads, self.d_ff)


@dataclass(frozen=True)
class Stage:
    """Optimizer steps `first_step` … `end` − 1 sample at these rates, from the part of the model that has joined."""

    number: int
    first_step: int
    end: int
    rates: Rates
    grown: Grown = Grown()

    @property
    def is_full(self) -> bool:
        """Whether it trains the full model."""
        return self.rates == Rates() and self.grown == Grown()

    @property
    def kept(self) -> Rates:
        """Fractions of the full model that it trains; `grown` must hold fractions, as `Grown.fractions` gives them."""
        joined = (self.grown.n_heads, self.grown.d_ff, self.grown.n_layers)
        rates = vars(self.rates).values()
        return Rates(*(rate if part is None else rate * part for rate, part in zip(rates, joined, strict=True)))

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

    Raises UserError if a stage would be empty or reversed, naming the boundary, the step and the smallest `max_steps`
    that would work.
    """
    names = names or [f"scheduler.stages[{i}].end" for i in range(len(specs))]
    if not specs:
        raise UserError("scheduler.stages=[]: must name at least one stage")
    ending = f"training ends at step {max_steps} (trainer.max_steps)"
    stages, previous, before = [], 0, "training starts at step 0"
    for number, (name, spec) in enumerate(zip(names, specs, strict=False), 1):
        is_last, end, problem = number == len(specs), boundary_step(spec.end, max_steps), ""
        own = ending if is_last and spec.end is None else f"{name}={spec.end} is step {end}"
        if is_last and end != max_steps:
            raise UserError(
                f"{name}={spec.end}: the last stage must end with the training at "
                f"step {max_steps}; leave its end out, or add a last stage without one"
            )
        if not is_last and end >= max_steps:
            problem = f"{own}, but {ending}: stage {number + 1} would be empty"
        elif end <= previous:
            problem = f"{own}, but {before}: stage {number} would be {'empty' if end == previous else 'reversed'}"
        if problem:
            smallest, works = smallest_max_steps(specs), "no trainer.max_steps makes these boundaries increase"
            if smallest is not None:
                works = f"the smallest trainer.max_steps that works is {smallest}"
            raise UserError(f"{problem}; {works}")
        stages.append(Stage(number, previous, end, spec.rates, spec.grown))
        previous, before = end, own
    return tuple(stages)


def smallest_max_steps(specs: Sequence[StageSpec]) -> int | None:
    """The smallest run length at which no stage is empty, or None if none is found."""
    fractions = [spec.end for spec in specs if isinstance(spec.end, float)]
    if any(a >= b for a, b in itertools.pairwise(fractions)):
        return None
    earliest = shortest = 0
    for spec in specs:
        earliest += 1  # the first step at which this boundary can lie: each lies at least a step after the one before
        if isinstance(spec.end, float):
            shortest = max(shortest, math.floor((earliest - 0.5) / max(spec.end, _SMALLEST_FRACTION)))
        elif spec.end is not None:
            earliest = max(earliest, spec.end)
    shortest = max(shortest, earliest)
    for max_steps in range(shortest, shortest + _RUN_LENGTHS_TRIED):
        ends = [0, *(boundary_step(spec.end, max_steps) for spec in specs)]
        if all(a < b for a, b in itertools.pairwise(ends)) and ends[-1] == max_steps:
            return max_steps
    return None


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that optimizer step `step` (from 0) belongs to."""
    return next(stage for stage in stages if step < stage.end)


def _equal_ends(n_stages: int) -> list[float | None]:
    """The ends of equal stages. Raises ValueError."""
    if type(n_stages) is not int or not 1 <= n_stages <= _MOST_STAGES:
        raise ValueError(f"scheduler.n_stages={n_stages}: must be an integer of at least 1 and at most {_MOST_STAGES}")
    return [*((i + 1) / n_stages for i in range(n_stages - 1)), None]


def ramp(rates: Rates, n_stages: int = 4) -> list[StageSpec]:
    """Rates that rise from `rates` to 1 in `n_stages` equal stages; the last one trains the full model."""

    def rate(low: float, i: int) -> float:
        return 1.0 if i == n_stages - 1 else low + (1.0 - low) * i / (n_stages - 1)

    ends = enumerate(_equal_ends(n_stages))
    return [StageSpec(end, rate(rates.heads, i), rate(rates.mlp, i), rate(rates.layers, i)) for i, end in ends]


def raptr(rates: Rates, n_stages: int = 4) -> list[StageSpec]:
    """More and more layers, from `rates.layers` to all, in equal stages (Panigrahi et al., 2025, arXiv 2402.05913)."""
    return ramp(Rates(layers=rates.layers), n_stages)


def layer_drop(rates: Rates, p_max: float = 0.5, n_stages: int = 4) -> list[StageSpec]:
    """Layer l of L is left out with probability p·l / (L − 1), and p falls from `p_max` to 0 in equal stages.

    After arXiv 2609.05275. On average p / 2 of the layers are left out. `sampling.layer_strategy=increasing` leaves out
    the deeper ones more often.
    """
    ends = _equal_ends(n_stages)
    if type(p_max) not in (int, float) or not 0 < p_max <= 1:
        raise ValueError(f"scheduler.p_max={p_max}: must be a number in (0, 1]")
    return [StageSpec(end, layers=1 - p_max * (1 - i / max(1, n_stages - 1)) / 2) for i, end in enumerate(ends)]


def stacking(
    rates: Rates, grow_at: Boundary | Sequence[Boundary] = 0.5, depths: Part | Sequence[Part] = 0.5
) -> list[StageSpec]:
    """The first `depths` layers until `grow_at`, then all; lists of equal length grow as many times.

    Gong et al. (2019); Du et al. (2024), arXiv 2405.15319. How the layers that join start is `scheduler.grow`.
    """
    ends, layers = (list(given) if isinstance(given, list | tuple) else [given] for given in (grow_at, depths))
    if len(ends) != len(layers):
        raise ValueError(
            f"scheduler.grow_at={grow_at}, scheduler.depths={depths}: must be as many, a depth until each growth"
        )
    if None in (*ends, *layers):
        raise ValueError(f"scheduler.grow_at={grow_at}, scheduler.depths={depths}: must be numbers")
    return [*(StageSpec(end, n_layers=depth) for end, depth in zip(ends, layers, strict=True)), StageSpec()]


NAMED_SCHEDULES = {"ramp": ramp, "raptr": raptr, "layer_drop": layer_drop, "stacking": stacking}


def stack(old: int, new: int) -> list[int | None]:
    return [layer % old for layer in range(new)]


def interleave(old: int, new: int) -> list[int | None]:
    return [layer * old // new for layer in range(new)]


def middle(old: int, new: int) -> list[int | None]:
    added = new - old
    size = min(old, added)
    start = (old - size) // 2
    return [*range(start + size), *(start + layer % size for layer in range(added)), *range(start + size, old)]


def fresh(old: int, new: int) -> list[int | None]:
    return [*range(old), *[None] * (new - old)]


GROWTHS = {"stack": stack, "interleave": interleave, "middle": middle, "zero": fresh, "random": fresh}
"""(old, new) → for each layer of the larger model the layer that it starts from, None for its initial weights.

method      6 layers from 3   the layers that join
stack       0 1 2 0 1 2       all trained layers again (Gong et al., 2019; Du et al., 2024, arXiv 2405.15319)
interleave  0 0 1 1 2 2       each layer again, right after itself
middle      0 1 2 0 1 2       the middle layers again, right after themselves; 6 layers from 4 are 0 1 2 1 2 3
                              (MIDAS: Saunshi et al., 2024, arXiv 2409.19044)
zero        0 1 2 · · ·       as initialised, output projections 0: the function stays
random      0 1 2 · · ·       as initialised

No source lies above its target, so copying from the last layer down never overwrites a source that is still needed.
"""


def layer_sources(method: str, old: int, new: int) -> list[int | None]:
    """The layer that each of the `new` layers starts from; `method` may be the user's function. Raises UserError."""
    if old == 0 and method in ("stack", "interleave", "middle"):
        raise UserError(f"scheduler.grow={method}: there is no layer to copy from 0; must be zero or random")
    found = list(named_function(method, GROWTHS, "scheduler.grow")(old, new))
    if len(found) != new or any(
        source is not None and not (type(source) is int and 0 <= source <= min(layer, old - 1))
        for layer, source in enumerate(found)
    ):
        raise UserError(
            f"scheduler.grow={method}: must return {new} sources to grow from {old} layers to {new}, each None or a "
            f"layer below {old} that does not lie above the one it starts; got {found}"
        )
    return found
