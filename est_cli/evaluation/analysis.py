"""What the paper argues from, measured on a run: its stage transitions, the spread over subnetworks, the sharpness."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from est_cli.data.batches import validation_windows
from est_cli.evaluation import Measures
from est_cli.evaluation.loss import Spread, spread
from est_cli.evaluation.run import OpenRun, load_model
from est_cli.evaluation.sharpness import hessian_product, largest_eigenvalue, loss_rises
from est_cli.subnet.schedule import Rates, Stage, stage_at
from est_cli.tracking.metrics import METRICS_NAME, iterate_metrics
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.validation import mean_loss

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """The losses of the full model and of its subnetworks, with the weights of one checkpoint."""

    updates: int
    full_loss: float
    spreads: list[Spread]

    def losses(self, rates: Rates) -> np.ndarray:
        """One for each plan of some rates; for full rates only the full model's."""
        if rates == Rates():
            return np.array([self.full_loss])
        return np.array(next(found.losses for found in self.spreads if found.rates == rates))


def analyze(run: OpenRun, val: np.ndarray, rates: Sequence[Rates], measures: Measures, say: Say) -> dict[str, Any]:
    """Everything about one run, as plain numbers.

    val [n] of the validation split; `rates` are those of the subnetworks to sample, the run's included.
    """
    windows = validation_windows(val, run.config.data.seq_len, measures.tokens)
    updates = run.checkpoint.step
    say(f"{run.folder}: sharpness after {updates} updates")
    sharpness, perturbation = _sharpness(run, val, measures), _perturbation(run, windows, measures)
    measured = [_measure(run, updates, windows, rates, measures, say)]
    if measures.checkpoints == "all":
        measured += _measure_earlier(run, windows, rates, measures, say)
    measured.reverse()
    return {
        "step": updates - 1,
        "tokens": windows[:, 1:].size,
        "transitions": _transitions(run, measured, measures.window),
        "checkpoints": [_checkpoint_facts(run, entry) for entry in measured],
        "sharpness": sharpness,
        "perturbation": perturbation,
    }


def _measure_earlier(
    run: OpenRun, windows: np.ndarray, rates: Sequence[Rates], measures: Measures, say: Say
) -> Iterator[Measured]:
    """The newest first."""
    for checkpoint in Checkpoints(run.folder / "checkpoints").sound(say):
        if checkpoint.step < run.checkpoint.step:
            model = load_model(run.config, checkpoint)
            yield _measure(replace(run, model=model), checkpoint.step, windows, rates, measures, say)


def _measure(
    run: OpenRun, updates: int, windows: np.ndarray, rates: Sequence[Rates], measures: Measures, say: Say
) -> Measured:
    say(f"{run.folder}: losses after {updates} updates")
    batch_size = run.config.trainer.batch_size
    full_loss = mean_loss(run.model, windows, batch_size)
    sampling, plans, seed = run.config.sampling, measures.plans, measures.seed
    spreads = [spread(run.model, sampling, each, windows, batch_size, plans, seed) for each in rates]
    return Measured(updates, full_loss, spreads)


def _checkpoint_facts(run: OpenRun, measured: Measured) -> dict[str, Any]:
    last_step = measured.updates - 1
    stage = stage_at(run.config.stages, last_step).number
    subnetworks = [found.facts() for found in measured.spreads]
    return {"step": last_step, "stage": stage, "full_loss": measured.full_loss, "subnetworks": subnetworks}


def _transitions(run: OpenRun, measured: list[Measured], window: int) -> list[dict[str, Any]]:
    """For each one, what the run logged around it, and what its checkpoint shows if there is one."""
    stages = run.config.stages
    at = {entry.updates: entry for entry in measured}
    logged = transitions(stages, iterate_metrics(run.folder / METRICS_NAME), window)
    return [
        {
            "step": old.end,
            "from_stage": old.number,
            "to_stage": new.number,
            **found,
            "at_checkpoint": _larger(at[old.end], old, new) if old.end in at else None,
        }
        for (old, new), found in zip(pairwise(stages), logged, strict=True)
    ]


def transitions(stages: Sequence[Stage], records: Iterable[Mapping[str, Any]], window: int) -> list[dict[str, Any]]:
    """The losses around the end of every stage but the last, from `records`, the lines of metrics.jsonl.

    `train_loss`: means over up to `window` logged steps of each stage's own subnetworks, `before` and `after` the
    transition, and the `standard_error` of their difference from the scatter of the steps. None if one side is empty.
    `val_loss`: the full model's, the last before the new stage and the first within it, each with its number of
    `updates`. None if one is missing.
    """
    first: dict[int, list[float]] = defaultdict(list)
    last: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=window))
    val: list[dict[str, Any]] = []
    for record in records:
        stage, loss = record["stage"], record["train/loss"]
        if loss is not None:
            last[stage].append(loss)
            if len(first[stage]) < window:
                first[stage].append(loss)
        if record["val/loss"] is not None:
            val.append({"updates": record["step"] + 1, "loss": record["val/loss"]})
    return [
        {"train_loss": _step(list(last[old.number]), first[new.number]), "val_loss": _around(val, old.end)}
        for old, new in pairwise(stages)
    ]


def _step(before: list[float], after: list[float]) -> dict[str, float] | None:
    if not before or not after:
        return None
    variances = [np.var(side, ddof=1) / len(side) if len(side) > 1 else 0.0 for side in (before, after)]
    error = float(np.sqrt(sum(variances)))
    return {"before": float(np.mean(before)), "after": float(np.mean(after)), "standard_error": error}


def _around(val: list[dict[str, Any]], end: int) -> list[dict[str, Any]] | None:
    before = [entry for entry in val if entry["updates"] <= end]
    after = [entry for entry in val if entry["updates"] > end]
    return [before[-1], after[0]] if before and after else None


def _larger(measured: Measured, old: Stage, new: Stage) -> dict[str, float]:
    """What only the larger subnetworks do to the loss, with equal weights; compared plan by plan."""
    before, after = measured.losses(old.rates), measured.losses(new.rates)
    drops = before - after
    error = drops.std(ddof=1) / np.sqrt(len(drops)) if len(drops) > 1 else 0.0
    return {
        "full_loss": measured.full_loss,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "standard_error": float(error),
    }


def _sharpness(run: OpenRun, val: np.ndarray, measures: Measures) -> dict[str, Any]:
    windows = validation_windows(val, run.config.data.seq_len, measures.hessian_tokens)
    parameter = next(run.model.parameters())
    size = sum(p.numel() for p in run.model.parameters())
    start = torch.randn(size, generator=torch.Generator().manual_seed(measures.seed)).to(parameter)
    found = asdict(largest_eigenvalue(hessian_product(run.model, windows), start, measures.iterations))
    return {"largest_eigenvalue": found.pop("value"), **found, "tokens": windows[:, 1:].size}


def _perturbation(run: OpenRun, windows: np.ndarray, measures: Measures) -> list[dict[str, Any]]:
    def loss() -> float:
        return mean_loss(run.model, windows, run.config.trainer.batch_size)

    return [
        {
            "relative_norm": found.relative_norm,
            "norm": found.norm,
            "mean": float(np.mean(found.rises)),
            "std": float(np.std(found.rises, ddof=1)) if len(found.rises) > 1 else 0.0,
            "rises": list(found.rises),
        }
        for found in loss_rises(run.model, loss, measures.norms, measures.draws, measures.seed)
    ]
