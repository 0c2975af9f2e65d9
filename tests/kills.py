"""Real runs of est-train that send themselves SIGKILL, or another signal, at a place of one's choice."""

import functools
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from est_cli.runs.directory import RunDirectory
from est_cli.tracking.metrics import MetricsFile
from est_cli.training import checkpoint, loop
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.inputs import Inputs
from est_cli.training.loop import Training
from est_cli.training.optimizer import SampledAdamW
from tests.commands.cli import ON_CORPUS, Process

RUN = (
    *ON_CORPUS, "trainer.grad_accum=3", "trainer.save_final=full", "optimizer.unsampled=freeze", "checkpoint.keep=2",
    "format=json",
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """Falls at the first visit of `place` once the run has done `step` steps."""

    place: str
    step: int
    signal: int = signal.SIGKILL


def start(folder: Path, overrides: Sequence[str], kill: Kill | None = None, **environment: str) -> Process:
    """Start est-train in the folder."""
    before = None if kill is None else functools.partial(_set_trap, kill)
    return Process("est-train", *overrides, cwd=folder, before=before, **environment)


def _set_trap(kill: Kill) -> None:
    PLACES[kill.place](_Trap(kill))


class _Trap:
    """Sends this process the signal, once, when the run is far enough."""

    def __init__(self, kill: Kill):
        self._kill, self._training, self._original = kill, None, Training.__init__
        Training.__init__ = lambda *arguments, **options: self._begin(*arguments, **options)

    def _begin(self, training: Training, *arguments: Any, **options: Any) -> None:
        self._training = training
        self._original(training, *arguments, **options)

    @property
    def is_set(self) -> bool:
        return self._training is not None and self._training.step >= self._kill.step

    def __call__(self) -> None:
        if self.is_set:
            self._training = None
            os.kill(os.getpid(), self._kill.signal)


def _at(owner: object, name: str, act: Callable[..., Any]) -> Callable[[_Trap], None]:
    """The place in `owner.name`: `act(trap, original, *arguments)` is called instead."""

    def set_trap(trap: _Trap) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **options: act(trap, original, *arguments, **options))

    return set_trap


def _before(owner: object, name: str, when: Callable[..., bool] = lambda *_: True) -> Callable[[_Trap], None]:
    """The place where `owner.name` is called with arguments for which `when` holds."""

    def act(trap: _Trap, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            trap()
        return original(*arguments, **options)

    return _at(owner, name, act)


def _accumulate(trap, original, inputs, step):
    plan, windows = original(inputs, step)

    def until_the_second():
        for number, tokens in enumerate(windows):
            if number == 1:
                trap()
            yield tokens

    return plan, until_the_second()


def _evaluate(trap, original, model, windows, *rest):
    original(model, windows[: len(windows) // 2], *rest)
    trap()
    return original(model, windows, *rest)


def _build(trap, original, training, stage):
    subnet = original(training, stage)
    if training.step == stage.first_step > 0:
        trap()
    return subnet


def _write_half_of_the_moments(trap, original, tensors, path):
    original(tensors, path)
    if path.name == checkpoint.OPTIMIZER and trap.is_set:
        os.truncate(path, path.stat().st_size // 2)
        trap()


def _remove_a_file_of_a_checkpoint(trap, original, path, **options):
    if path.name.startswith(".dropped-") and trap.is_set:
        next(path.iterdir()).unlink()
        trap()
    original(path, **options)


def _write_a_part_of_a_line(trap, original, metrics):
    if trap.is_set:
        metrics._file.write(metrics._waiting[:25])
        trap()
    original(metrics)


_CALLS = itertools.count()
PLACES: dict[str, Callable[[_Trap], None]] = {
    "in a gradient accumulation": _at(Inputs, "of", _accumulate),
    "in the optimizer": _before(SampledAdamW, "_moves", lambda *_: next(_CALLS) % 7 == 4),
    "in an evaluation": _at(loop, "validation_loss", _evaluate),
    "on a stage boundary": _at(Training, "_build", _build),
    "in a checkpoint's file": _at(checkpoint, "write_tensors", _write_half_of_the_moments),
    "before a checkpoint's rename": _before(Path, "rename", lambda path, _: path.name.startswith(".writing-step")),
    "after a checkpoint's rename": _before(Checkpoints, "_prune"),
    "while an old checkpoint is removed": _at(shutil, "rmtree", _remove_a_file_of_a_checkpoint),
    "in a line of metrics.jsonl": _at(MetricsFile, "_write_waiting", _write_a_part_of_a_line),
    "before the summary": _before(RunDirectory, "write_summary"),
}
