"""How a number of units is chosen: the paper's random sampling, and its alternatives.

Random indices are the ranks of raw Philox words (Salmon et al., 2011) under a key that says what is drawn, so
that they need no state, no global generator, and survive upgrades of every library.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from est_cli.errors import UserError

DIMENSIONS = ("heads", "mlp", "layers")


@dataclass(frozen=True)
class Draw:
    """What is drawn: the key of one choice of `kept` units out of `total`.

    `number` counts the draws of a stage (every `resample_every` steps makes a new one), `group` is the
    key/value group for query heads and 0 elsewhere. `layer_turns` draws visit every layer once, where a strategy
    visits layers in turn; it is 1 for layers themselves, and no part of the key.
    """

    seed: int
    stage_start: int
    number: int
    layer: int
    dimension: str
    group: int = 0
    layer_turns: int = 1

    @property
    def visit(self) -> int:
        """How often this layer was visited before: units inside it move on with the visits, not with the draws."""
        return self.number // self.layer_turns

    def words(self, n: int) -> np.ndarray:
        """`n` random 64-bit words that depend on this key alone."""
        where = (self.layer << 32) | (self.group << 8) | DIMENSIONS.index(self.dimension)
        generator = np.random.Philox(
            key=np.array([self.seed, 0], dtype=np.uint64),
            counter=np.array([0, self.number, self.stage_start, where], dtype=np.uint64),
        )
        return generator.random_raw(n)


Strategy = Callable[[Draw, int, int], np.ndarray]
"""(draw, total, kept) → `kept` different indices below `total`, in any order."""


def random(draw: Draw, total: int, kept: int) -> np.ndarray:
    """Uniform, without replacement: the paper's sampling."""
    return np.argsort(draw.words(total), kind="stable")[:kept]


def prefix(draw: Draw, total: int, kept: int) -> np.ndarray:
    """Always the first units: nested subnetworks."""
    return np.arange(kept)


def balanced(draw: Draw, total: int, kept: int) -> np.ndarray:
    """Random parts of one size that make up the whole: in k visits of a layer every unit is trained exactly once.

    After k visits the units are dealt out anew, so that neighbours change. Raises UserError unless the rate is 1/k.
    """
    parts = _parts(draw, total, kept)
    deal, turn = divmod(draw.visit, parts)
    return _dealt(draw, deal, total).reshape(parts, kept)[turn]


def cyclic(draw: Draw, total: int, kept: int) -> np.ndarray:
    """As `balanced`, with the same parts through the whole stage, visited in an order that is drawn for every round.

    The order is drawn for every layer and dimension alone: with one order for all, the first heads would only ever
    meet the first neurons, and the stage would train k separate networks. Raises UserError unless the rate is 1/k.
    """
    parts = _parts(draw, total, kept)
    round_number, turn = divmod(draw.visit, parts)
    part = _dealt(draw, round_number + 1, parts)[turn]
    return _dealt(draw, 0, total).reshape(parts, kept)[part]


def _parts(draw: Draw, total: int, kept: int) -> int:
    if total % kept:
        fitting = min((n for n in range(1, total) if total % n == 0), key=lambda n: abs(n - kept))
        raise UserError(
            f"sampling.{draw.dimension}: this strategy visits {total} units in parts of one size, and {kept} are not "
            f"such a part; must be a rate 1/k, for example {fitting / total:g}"
        )
    return total // kept


def _dealt(draw: Draw, number: int, total: int) -> np.ndarray:
    """`total` units in random order, by `number` instead of the draw's own."""
    return np.argsort(replace(draw, number=number).words(total), kind="stable")


STRATEGIES: dict[str, Strategy] = {"random": random, "prefix": prefix, "balanced": balanced, "cyclic": cyclic}
