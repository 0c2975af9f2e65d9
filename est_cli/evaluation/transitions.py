"""The loss around each stage transition, as the run logged it."""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from est_cli.subnet.schedule import Stage


@dataclass(frozen=True)
class TrainingLoss:
    """Means over up to `window` logged steps on either side of a transition, of each stage's own subnetworks."""

    before: float
    after: float
    standard_error: float
    """Of their difference, from the scatter of the steps."""


@dataclass(frozen=True)
class Validation:
    """A loss of the full model, logged after `updates` updates."""

    updates: int
    loss: float


@dataclass(frozen=True)
class Transition:
    """From stage `stage` to the next one, after `updates` updates."""

    updates: int
    stage: int
    train: TrainingLoss | None
    """None where the run has not logged both sides."""
    val: tuple[Validation, Validation] | None
    """The last one before the new stage and the first one within."""


def transitions(stages: Sequence[Stage], records: Iterable[Mapping[str, Any]], window: int) -> list[Transition]:
    """What `records`, the lines of metrics.jsonl, tell of the end of every stage but the last."""
    first: dict[int, list[float]] = defaultdict(list)
    last: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=window))
    val: list[Validation] = []
    for record in records:
        stage, loss = record["stage"], record["train/loss"]
        if loss is not None:
            last[stage].append(loss)
            if len(first[stage]) < window:
                first[stage].append(loss)
        if record["val/loss"] is not None:
            val.append(Validation(record["step"] + 1, record["val/loss"]))
    return [
        Transition(
            old.end,
            old.number,
            _training_loss(list(last[old.number]), first[new.number]),
            _around(val, old.end),
        )
        for old, new in pairwise(stages)
    ]


def _training_loss(before: list[float], after: list[float]) -> TrainingLoss | None:
    if not before or not after:
        return None
    variances = [np.var(side, ddof=1) / len(side) if len(side) > 1 else 0.0 for side in (before, after)]
    return TrainingLoss(float(np.mean(before)), float(np.mean(after)), float(np.sqrt(sum(variances))))


def _around(val: list[Validation], end: int) -> tuple[Validation, Validation] | None:
    before = [entry for entry in val if entry.updates <= end]
    after = [entry for entry in val if entry.updates > end]
    return (before[-1], after[0]) if before and after else None
