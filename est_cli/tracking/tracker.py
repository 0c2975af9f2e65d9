"""What the training loop tells its trackers, on rank 0 only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from est_cli.config import TrainConfig
from est_cli.subnet.flops import Ledger
from est_cli.subnet.schedule import Stage

Record = dict[str, float | int | None]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first step."""

    run_dir: Path
    config: TrainConfig
    first_step: int
    """0, or the step at which a resumed run continues."""
    ledger: Ledger
    command: str
    """The command line that continues the run."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.ledger.stages

    @property
    def max_steps(self) -> int:
        return self.stages[-1].end

    def stage_at(self, step: int) -> Stage:
        """The stage of `step`; the last stage if the run was killed after its last step."""
        return next((stage for stage in self.stages if step < stage.end), self.stages[-1])


class Tracker:
    """Listens to a run. Subclasses override what they need.

    Only `MetricsFile` may stop the training; every other tracker must survive its own failures.
    """

    def start(self, run: RunInfo) -> None:
        """Called before the first step."""

    def log(self, record: Record) -> None:
        """Called after the update of a logged step."""

    def say(self, message: str) -> None:
        """Called with one line for people."""

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Called once; `status` is done, stopped or failed."""
