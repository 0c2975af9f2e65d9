"""What the paper argues from, measured on a run: its stage transitions, the spread over subnetworks, the sharpness."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from est_cli.data import Say
from est_cli.data.batches import validation_windows
from est_cli.evaluation import Measures
from est_cli.evaluation.loss import mean_and_std, spread
from est_cli.evaluation.run import OpenRun, load_model
from est_cli.evaluation.sharpness import hessian_product, largest_eigenvalue, loss_rises
from est_cli.model.transformer import Transformer
from est_cli.subnet.schedule import Rates, Stage, stage_at
from est_cli.tracking.metrics import METRICS_NAME, iterate_metrics
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.validation import mean_loss


def analyze(run: OpenRun, val: np.ndarray, rates: Sequence[Rates], measures: Measures, say: Say) -> dict[str, Any]:
    """Everything about one run, as plain numbers.

    val [n] of the validation split; `rates` are those of the subnetworks to sample, the run's included.
    """
    config, windows = run.config, validation_windows(val, run.config.data.seq_len, measures.tokens)
    say(f"{run.folder}: sharpness after {run.checkpoint.step} updates")
    sharpness = _sharpness(run, val, measures)
    batch_size, noise = config.trainer.batch_size, (measures.norms, measures.draws, measures.seed)
    perturbation = loss_rises(run.model, lambda: mean_loss(run.model, windows, batch_size), *noise)
    checkpoints = []
    for updates, model in _models(run, measures, say):
        say(f"{run.folder}: losses after {updates} updates")
        spreads = [
            spread(model, config.sampling, each, windows, batch_size, measures.plans, measures.seed) for each in rates
        ]
        entry = {"step": updates - 1, "stage": stage_at(config.stages, updates - 1).number}
        entry |= {"full_loss": mean_loss(model, windows, batch_size), "subnetworks": spreads}
        checkpoints.insert(0, entry)
    records = iterate_metrics(run.folder / METRICS_NAME)
    return {
        "step": run.checkpoint.step - 1,
        "tokens": windows[:, 1:].size,
        "transitions": transitions(config.stages, records, checkpoints, measures.window),
        "checkpoints": checkpoints,
        "sharpness": sharpness,
        "perturbation": perturbation,
    }


def _models(run: OpenRun, measures: Measures, say: Say) -> Iterator[tuple[int, Transformer]]:
    """Numbers of updates, and the model after them; the newest first."""
    yield run.checkpoint.step, run.model
    if measures.checkpoints == "all":
        for checkpoint in Checkpoints(run.folder / "checkpoints").sound(say):
            if checkpoint.step < run.checkpoint.step:
                yield checkpoint.step, load_model(run.config, checkpoint)


def _sharpness(run: OpenRun, val: np.ndarray, measures: Measures) -> dict[str, Any]:
    windows = validation_windows(val, run.config.data.seq_len, measures.hessian_tokens)
    parameters = list(run.model.parameters())
    generator = torch.Generator().manual_seed(measures.seed)
    start = torch.randn(sum(p.numel() for p in parameters), generator=generator).to(parameters[0])
    found = largest_eigenvalue(hessian_product(run.model, windows), start, measures.iterations)
    return {**found, "tokens": windows[:, 1:].size}


def transitions(
    stages: Sequence[Stage], records: Iterable[Mapping[str, Any]], checkpoints: Sequence[dict[str, Any]], window: int
) -> list[dict[str, Any]]:
    """The losses around the end of every stage but the last, from `records`, the lines of metrics.jsonl.

    `train_loss`: means over up to `window` logged steps of each stage's own subnetworks, `before` and `after` the
    transition, and the `standard_error` of their difference from the scatter of the steps. None if one side is empty.
    `val_loss`: the full model's, the last before the new stage and the first within it, each with its number of
    `updates`. None if one is missing.
    `at_checkpoint`: the losses that one of `checkpoints` has there. None if there is none.
    """
    losses: dict[int, list[float]] = defaultdict(list)
    val: list[dict[str, Any]] = []
    for record in records:
        if record["train/loss"] is not None:
            losses[record["stage"]].append(record["train/loss"])
        if record["val/loss"] is not None:
            val.append({"updates": record["step"] + 1, "loss": record["val/loss"]})
    at = {entry["step"] + 1: entry for entry in checkpoints}
    return [
        {
            "step": old.end,
            "from_stage": old.number,
            "to_stage": new.number,
            "train_loss": _change(losses[old.number][-window:], losses[new.number][:window]),
            "val_loss": _around(val, old.end),
            "at_checkpoint": _larger(at[old.end], old, new) if old.end in at else None,
        }
        for old, new in pairwise(stages)
    ]


def _change(before: Sequence[float], after: Sequence[float]) -> dict[str, float] | None:
    if not before or not after:
        return None
    old, new = mean_and_std(before), mean_and_std(after)
    error = np.hypot(old["std"] / np.sqrt(len(before)), new["std"] / np.sqrt(len(after)))
    return {"before": old["mean"], "after": new["mean"], "standard_error": float(error)}


def _around(val: list[dict[str, Any]], end: int) -> list[dict[str, Any]] | None:
    before = [entry for entry in val if entry["updates"] <= end][-1:]
    after = [entry for entry in val if entry["updates"] > end][:1]
    return before + after if before and after else None


def _larger(entry: dict[str, Any], old: Stage, new: Stage) -> dict[str, float]:
    """Losses at the old and the new stage's rates, with the same weights; compared plan by plan."""
    before, after = (_losses(entry, stage.rates) for stage in (old, new))
    drops = before - after
    return {
        "full_loss": entry["full_loss"],
        "before": float(before.mean()),
        "after": float(after.mean()),
        "standard_error": float(mean_and_std(drops)["std"] / np.sqrt(len(drops))),
    }


def _losses(entry: dict[str, Any], rates: Rates) -> np.ndarray:
    """One for each plan of some rates; for full rates only the full model's."""
    if rates == Rates():
        return np.array([entry["full_loss"]])
    return np.array(next(found["losses"] for found in entry["subnetworks"] if found["rates"] == asdict(rates)))
