"""How a number of units is chosen: the paper's random sampling, and its alternatives.

Random indices are the ranks of raw Philox words (Salmon et al., 2011) under a key that says what is drawn, so
that they need no state, no global generator, and survive upgrades of every library.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DIMENSIONS = ("heads", "mlp", "layers")


@dataclass(frozen=True)
class Draw:
    """What is drawn: the key of one choice of `kept` units out of `total`.

    `number` counts the draws of a stage (every `resample_every` steps makes a new one), `group` is the
    key/value group for query heads and 0 elsewhere.
    """

    seed: int
    stage_start: int
    number: int
    layer: int
    dimension: str
    group: int = 0

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


STRATEGIES: dict[str, Strategy] = {"random": random, "prefix": prefix}
