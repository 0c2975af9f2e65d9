"""Sampling strategies: the paper's random sampling, and its alternatives.

Random indices are the ranks of raw Philox words (Salmon et al., 2011) under a key that says what is drawn. They need no
state and no global generator, and survive upgrades of every library.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from est_cli.errors import UserError

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
        """`n` random 64-bit words that depend only on this key."""
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
    return _smallest(draw.words(total), kept)


def _smallest(words: np.ndarray, kept: int) -> np.ndarray:
    """Indices of the `kept` smallest words, ascending; the first of equal words. A selection is faster than a sort."""
    if kept == 0:
        return np.arange(0)
    last = np.partition(words, kept - 1)[kept - 1]
    chosen = words < last
    ties = np.flatnonzero(words == last)
    chosen[ties[: kept - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def prefix(draw: Draw, total: int, kept: int) -> np.ndarray:
    """Always the first units: nested subnetworks."""
    return np.arange(kept)


def ends(draw: Draw, total: int, kept: int) -> np.ndarray:
    """Always the first and the last unit, and a uniform choice of those between: RAPTR's layers (arXiv 2402.05913)."""
    fixed = [0, total - 1][:kept]
    between = 1 + _smallest(draw.words(total - 2), kept - len(fixed))
    return np.concatenate([fixed, between]).astype(np.int64)


def increasing(draw: Draw, total: int, kept: int) -> np.ndarray:
    """Unit l is left out with probability p·l / (total − 1), so deeper ones more often.

    Systematic sampling (Madow, 1949): steps of one through the running sum of the inclusion probabilities, from a
    uniform start. Every draw keeps `kept` units, and every unit has exactly its probability.
    """
    sums = np.concatenate([[0.0], np.cumsum(inclusion_probabilities("increasing", total, kept))])
    sums[-1] = kept  # the last bit of a sum must not lose a unit
    start = (int(draw.words(1)[0]) >> 11) * 2.0**-53
    return np.searchsorted(sums, start + np.arange(kept), side="right") - 1


def inclusion_probabilities(strategy: str, total: int, kept: int) -> np.ndarray:
    """The probability of each of `total` units to be kept; the same for all except with `increasing`."""
    if strategy != "increasing" or kept == total:
        return np.full(total, kept / total)
    if 2 * kept < total:
        raise UserError(
            f"sampling.layer_strategy=increasing: keeps at least half of the {total} layers, and a stage asks for "
            f"{kept}; give higher rates, or a scheduler.p_max of at most 1"
        )
    return 1 - 2 * (total - kept) / total * np.arange(total) / (total - 1)


STRATEGIES: dict[str, Strategy] = {"random": random, "prefix": prefix, "ends": ends, "increasing": increasing}
