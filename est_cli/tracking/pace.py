"""How fast each stage runs, and the time that is left."""

from collections import deque
from statistics import median

from est_cli.tracking.tracker import Record, RunInfo

_STEPS_REMEMBERED = 21
_STEPS_BEFORE_A_GUESS = 3


class Pace:
    """Later stages train larger subnetworks: a stage that has not been seen yet is expected to take the
    time of the latest one, times the ratio of their FLOPs.
    """

    def __init__(self, run: RunInfo):
        self._run = run
        self._step_s: dict[int, deque[float]] = {}
        self._last: tuple[int, float] | None = None
        self._training_s = self._other_s = 0.0

    def observe(self, record: Record, now: float) -> None:
        """`now` in seconds of any clock. The time between records that is not in their steps went into
        evaluations and checkpoints, and is expected to go on as before.
        """
        step, step_s = record["step"], record["perf/step_s"]
        if step_s is None:
            return
        self._step_s.setdefault(record["stage"], deque(maxlen=_STEPS_REMEMBERED)).append(step_s)
        if self._last is not None:
            steps_s = (step - self._last[0]) * step_s
            self._training_s += steps_s
            self._other_s += max(0.0, now - self._last[1] - steps_s)
        self._last = step, now

    def step_s(self, stage: int) -> float | None:
        """Seconds of one step of a stage (from 1), measured or expected; None before anything is known."""
        if not self._step_s:
            return None
        if stage in self._step_s:
            return median(self._step_s[stage])
        latest = max(self._step_s)
        flops = self._run.flops_per_step
        return median(self._step_s[latest]) * flops[stage - 1] / flops[latest - 1]

    def seconds_left(self, now: float) -> float | None:
        """From `now` to the end of the training; None until a few steps have been measured."""
        if self._last is None or sum(map(len, self._step_s.values())) < _STEPS_BEFORE_A_GUESS:
            return None
        next_step = self._last[0] + 1
        if next_step >= self._run.max_steps:
            return 0.0
        steps_s = sum(
            (stage.end - max(stage.first_step, next_step)) * self.step_s(stage.number)
            for stage in self._run.stages
            if stage.end > next_step
        )
        overhead = self._other_s / self._training_s if self._training_s else 0.0
        return max(0.0, steps_s * (1 + overhead) - (now - self._last[1]))
