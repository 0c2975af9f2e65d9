"""Step times of the headline's schedules, measured apart, because the runs of the study share their cores."""

from pathlib import Path
from typing import Any

import torch

from est_cli.benchmark.case import case_of
from est_cli.benchmark.measure import measure
from est_cli.config import TrainConfig
from est_cli.files import write_json
from est_cli.runs.provenance import machine
from study import training
from study.grid import FULL, SIZES, runs_with

_ROUNDS = 100


def step_times(config: TrainConfig, rounds: int = _ROUNDS) -> list[float]:
    """Median seconds of a step in each stage, measured in turn; the last one is the full model's."""
    return [stage["step_s"] for stage in measure(case_of(config), rounds, memory=False)["stages"]]


def write_times(path: Path) -> None:
    """Measure every schedule of the headline at every size, on one thread. Takes about as long as a run."""
    torch.set_num_threads(1)
    times: dict[str, Any] = {"cpu": machine()["cpu"], "torch": torch.__version__, "threads": 1}
    for size in SIZES:
        runs = {run.arm: run for run in runs_with(group="headline", size=size)}
        shown = {arm.name: run for arm, run in runs.items() if arm.name == FULL or not arm.is_full}
        times[size] = {name: step_times(training.config_of(run)) for name, run in shown.items()}
    write_json(path, times)
