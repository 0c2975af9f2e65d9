"""How long an optimizer step took in every stage, and what its FLOPs were."""

from dataclasses import dataclass

import numpy as np

from est_cli.reports.arms import Arm
from est_cli.reports.records import RunRecord
from est_cli.subnet.schedule import Stage


@dataclass(frozen=True)
class StageTime:
    """One stage of one arm, over all its runs."""

    arm: Arm
    stage: Stage
    step_s: np.ndarray
    """float64 [samples], seconds."""
    flops: float
    """Median FLOPs of a step."""
    full_step_s: float = np.nan
    """Median step time of the arm's stage that trains the full model, where it has one."""
    full_flops: float = np.nan

    @property
    def median(self) -> float:
        return float(np.median(self.step_s))

    @property
    def time_ratio(self) -> float:
        return self.median / self.full_step_s

    @property
    def flops_ratio(self) -> float:
        return self.flops / self.full_flops


def stage_times(arm: Arm) -> list[StageTime]:
    """The stages of an arm that have step times, in order."""
    stages = max((run.stages for run in arm.runs), key=len)
    measured = []
    for stage in stages:
        step_s = np.concatenate([run.column("perf/step_s")[_in_stage(run, stage)] for run in arm.runs])
        flops = np.concatenate([run.column("flops/step")[_in_stage(run, stage)] for run in arm.runs])
        step_s, flops = step_s[np.isfinite(step_s)], flops[np.isfinite(flops)]
        if len(step_s):
            measured.append(StageTime(arm, stage, step_s, float(np.median(flops)) if len(flops) else np.nan))
    full = next((entry for entry in measured if entry.stage.is_full), None)
    if full is None:
        return measured
    return [StageTime(arm, entry.stage, entry.step_s, entry.flops, full.median, full.flops) for entry in measured]


def _in_stage(run: RunRecord, stage: Stage) -> np.ndarray:
    """Rows of the stage, but for its first step (it pays for compilation) where there are others. [rows]"""
    inside = run.column("stage") == stage.number
    later = inside & (run.column("step") > stage.first_step)
    return later if later.any() else inside
