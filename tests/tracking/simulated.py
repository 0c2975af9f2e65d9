"""A run of 30 steps in three stages that never trained: what a tracker is told of it."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import tiny

from est_cli.config import LoggerConfig
from est_cli.subnet.schedule import Rates, Stage
from est_cli.tracking.tracker import Record, RunInfo, Tracker

STAGES = (Stage(1, 0, 4, Rates(0.5, 0.5, 0.5)), Stage(2, 4, 14, Rates(0.5, 0.5)), Stage(3, 14, 30, Rates()))
FLOPS = (3e12, 5e12, 9e12)
BLOCK_FLOPS = (2e12, 4e12, 8e12)
STEP_S = (0.03, 0.05, 0.09)
TOKENS_PER_STEP = 64


def run_info(run_dir: Path, first_step: int = 0, **logger) -> RunInfo:
    config = tiny.train_config(max_steps=30)
    config = replace(config, logger=LoggerConfig(**logger))
    return RunInfo(run_dir, config, first_step, STAGES, FLOPS, FLOPS[-1], "est-train model=micro")


def record(step: int, val_loss: float | None = None, loss: float | None = None) -> Record:
    past = [next(s.number for s in STAGES if i < s.end) - 1 for i in range(step + 1)]
    stage = past[-1]
    total, blocks = sum(FLOPS[i] for i in past), sum(BLOCK_FLOPS[i] for i in past)
    return {
        "step": step,
        "tokens": TOKENS_PER_STEP * (step + 1),
        "stage": stage + 1,
        "train/loss": 4.0 - 0.1 * step if loss is None else loss,
        "train/lr": 1e-3,
        "train/grad_norm": 1.0,
        "val/loss": val_loss,
        "subnet/heads": 0.5,
        "subnet/mlp": 0.5,
        "subnet/layers": 1.0,
        "flops/step": FLOPS[stage],
        "flops/total": total,
        "flops/full_total": FLOPS[-1] * (step + 1),
        "flops/saved": 1 - total / (FLOPS[-1] * (step + 1)),
        "flops/saved_blocks": 1 - blocks / (BLOCK_FLOPS[-1] * (step + 1)),
        "perf/step_s": STEP_S[stage],
        "perf/tokens_per_s": TOKENS_PER_STEP / STEP_S[stage],
        "perf/mfu": None,
    }


def follow(trackers: Iterable[Tracker], run: RunInfo, records: Iterable[Record]) -> None:
    """Tells the trackers of a run, but not of its end."""
    for tracker in trackers:
        tracker.start(run)
    for each in records:
        for tracker in trackers:
            tracker.log(each)
