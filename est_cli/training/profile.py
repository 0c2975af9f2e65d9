"""trainer.profile=STEP:COUNT: torch.profiler's trace of a few steps of every stage, for Chrome and Perfetto."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TypeVar

import torch
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, record_function

from est_cli.subnet.schedule import Stage

MEMORY_EVENTS = 200_000
"""Allocations and frees that a memory snapshot holds at most, the newest."""

Function = TypeVar("Function", bound=Callable)


def phase(name: str) -> Callable[[Function], Function]:
    """Show a function under `name` in a trace. Costs one look at a flag while nothing is recorded."""

    def named(function: Function) -> Function:
        @wraps(function)
        def call(*arguments, **options):
            if not profiler._is_profiler_enabled:
                return function(*arguments, **options)
            with record_function(name):
                return function(*arguments, **options)

        return call

    return named


class Profile:
    """Writes `stage-N.trace.json` into `folder`, and on a GPU `stage-N.memory.pickle` (docs.pytorch.org/memory_viz)."""

    def __init__(self, folder: Path, device: torch.device, steps: tuple[int, int], say: Callable[[str], None]):
        self.folder, self.device, self.say = folder, device, say
        self.first, self.count = steps

    @contextmanager
    def stage(self, stage: Stage, step: int) -> Iterator[Callable[[], None]]:
        """Watch a stage from the run's step `step` on; call what it yields after every step.

        Records steps first … first + count − 1 of the stage, or what is left of them when a run continues among them,
        and writes them when the stage ends or the run stops.
        """
        begin = max(step, stage.first_step + self.first)
        end = stage.first_step + self.first + self.count
        if step >= end:
            yield lambda: None
            return
        warmup = min(1, begin - step)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")
            steps = {"wait": begin - step - warmup, "warmup": warmup, "active": end - begin}
            schedule = torch.profiler.schedule(**steps, repeat=1)
        with torch.profiler.profile(
            activities=activities,
            schedule=schedule,
            record_shapes=True,
            on_trace_ready=lambda found: self._write(found, f"stage-{stage.number}"),
            acc_events=True,
        ) as recorder:

            def record_memory() -> None:
                if step + recorder.step_num == begin and self.device.type == "cuda":
                    torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

            def advance() -> None:
                recorder.step()
                record_memory()

            record_memory()
            yield advance

    def _write(self, recorder: torch.profiler.profile, name: str) -> None:
        path = self.folder / f"{name}.trace.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorder.export_chrome_trace(str(path))
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
        except OSError as error:
            self.say(f"the trace {path} could not be written ({error.strerror or error}); training goes on")
        else:
            self.say(f"trace written: {path} (opens in ui.perfetto.dev and chrome://tracing)")
        finally:
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
