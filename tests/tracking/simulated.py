"""A run of 30 steps in three stages that never trained: what a tracker is told of it."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny

from est_cli.config import LoggerConfig
from est_cli.subnet.flops import Flops, Ledger
from est_cli.subnet.schedule import Rates, Stage, stage_at
from est_cli.tracking.tracker import Record, RunInfo, Tracker

STAGES = (Stage(1, 0, 4, Rates(0.5, 0.5, 0.5)), Stage(2, 4, 14, Rates(0.5, 0.5)), Stage(3, 14, 30, Rates()))
FLOPS = tuple(Flops(blocks=blocks * 10**12, head=10**12) for blocks in (2, 4, 8))
LEDGER = Ledger(STAGES, FLOPS, FLOPS[-1])
STEP_S = (0.03, 0.05, 0.09)
TOKENS_PER_STEP = 64


def run_info(run_dir: Path, first_step: int = 0, **logger) -> RunInfo:
    config = tiny.train_config(max_steps=30)
    config = replace(config, logger=LoggerConfig(**logger))
    return RunInfo(run_dir, config, first_step, LEDGER, "est-train model=micro")


def record(step: int, val_loss: float | None = None, loss: float | None = None) -> Record:
    stage = stage_at(STAGES, step).number
    return {
        "step": step,
        "tokens": TOKENS_PER_STEP * (step + 1),
        "stage": stage,
        "train/loss": 4.0 - 0.1 * step if loss is None else loss,
        "train/lr": 1e-3,
        "train/grad_norm": 1.0,
        "val/loss": val_loss,
        "subnet/heads": 0.5,
        "subnet/mlp": 0.5,
        "subnet/layers": 1.0,
        **LEDGER.record(step),
        "perf/step_s": STEP_S[stage - 1],
        "perf/tokens_per_s": TOKENS_PER_STEP / STEP_S[stage - 1],
        "perf/mfu": None,
    }


def follow(trackers: Iterable[Tracker], run: RunInfo, records: Iterable[Record], *end: Any) -> None:
    """Tells the trackers of a run, and with `end`, a status and a summary, of its end."""
    for tracker in trackers:
        tracker.start(run)
    for each in records:
        for tracker in trackers:
            tracker.log(each)
    for tracker in trackers if end else ():
        tracker.finish(*end)
