"""Real runs of est-train that kill themselves, with SIGKILL, at a place of one's choice.

A server that has imported torch, and never used it, forks the processes: a start costs half a second instead of three.
"""

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.commands.cli import TINY, clean_environment

RUN = (
    *TINY, "data=text", "data.path=corpus", "trainer.grad_accum=3", "trainer.save_final=full",
    "optimizer.unsampled=freeze", "checkpoint.keep=2", "format=json",
)  # fmt: skip
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.kills", "est_cli.commands.train", "est_cli.training.loop"])


@dataclass(frozen=True)
class Kill:
    """Dies at the first visit of `place` once the run has done `step` steps."""

    place: str
    step: int


def start(place: Path, overrides: Sequence[str], kill: Kill | None = None) -> Any:
    """Start est-train in the folder `place`; its output goes to `output.txt` there. Returns the process."""
    process = _CONTEXT.Process(target=_train, args=(place, tuple(overrides), kill))
    process.start()
    return process


def run(place: Path, overrides: Sequence[str], kill: Kill | None = None) -> int:
    """The exit code of `start`; minus the signal where it was killed."""
    process = start(place, overrides, kill)
    process.join()
    return process.exitcode


def _train(place: Path, overrides: tuple[str, ...], kill: Kill | None) -> None:
    os.chdir(place)
    os.environ.clear()
    os.environ.update(clean_environment(place))
    with open("output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["est-train", *overrides]
    from est_cli.commands.train import main

    if kill is not None:
        PLACES[kill.place](_Trap(kill.step))
    main()


class _Trap:
    """Kills this process, once the run is far enough."""

    def __init__(self, step: int):
        self._step, self._done = step, -1
        from est_cli.training.loop import Training

        build, train_step, trap = Training._build, Training._train_step, self

        def watched_build(training, stage):
            trap._done = training.step
            return build(training, stage)

        def watched_step(training, *rest):
            trap._done = training.step
            train_step(training, *rest)
            trap._done = training.step

        Training._build, Training._train_step = watched_build, watched_step

    @property
    def is_set(self) -> bool:
        return self._done >= self._step

    def __call__(self, *_: object) -> None:
        if self.is_set:
            os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: object, name: str, trap: Callable[..., None]) -> None:
    """Kill when `owner.name` is called."""
    original = getattr(owner, name)

    def trapped(*arguments, **options):
        trap(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, trapped)


def _in_accumulation(trap: _Trap) -> None:
    from est_cli.training.inputs import Inputs

    original = Inputs.of

    def trapped(inputs, step):
        plan, windows = original(inputs, step)

        def until_the_second():
            for number, tokens in enumerate(windows):
                if number == 1:
                    trap()
                yield tokens

        return plan, until_the_second()

    Inputs.of = trapped


def _in_the_optimizer(trap: _Trap) -> None:
    from est_cli.training.optimizer import SampledAdamW

    calls = itertools.count()
    _before(SampledAdamW, "_moves", lambda *_: trap() if next(calls) % 7 == 4 else None)


def _in_evaluation(trap: _Trap) -> None:
    from est_cli.training import loop

    original = loop.validation_loss

    def trapped(model, windows, *rest):
        original(model, windows[: len(windows) // 2], *rest)
        trap()
        return original(model, windows, *rest)

    loop.validation_loss = trapped


def _on_a_boundary(trap: _Trap) -> None:
    from est_cli.training.loop import Training

    original = Training._build

    def trapped(training, stage):
        subnet = original(training, stage)
        if training.step == stage.first_step > 0:
            trap()
        return subnet

    Training._build = trapped


def _in_a_checkpoint_file(trap: _Trap) -> None:
    """Half of the moments are written."""
    from est_cli.training import checkpoint

    original = checkpoint.write_tensors

    def trapped(tensors, path):
        original(tensors, path)
        if path.name == checkpoint.OPTIMIZER and trap.is_set:
            os.truncate(path, path.stat().st_size // 2)
            trap()

    checkpoint.write_tensors = trapped


def _before_the_checkpoints_rename(trap: _Trap) -> None:
    _before(Path, "rename", lambda path, _: trap() if path.name.startswith(".writing-step") else None)


def _after_the_checkpoints_rename(trap: _Trap) -> None:
    from est_cli.training.checkpoint import Checkpoints

    _before(Checkpoints, "_prune", trap)


def _while_an_old_checkpoint_is_removed(trap: _Trap) -> None:
    def removes_a_file(path: Path, **_: object) -> None:
        if path.name.startswith(".dropped-") and trap.is_set:
            next(path.iterdir()).unlink()
            trap()
        original(path, **_)

    original, shutil.rmtree = shutil.rmtree, removes_a_file


def _in_a_line_of_metrics(trap: _Trap) -> None:
    from est_cli.tracking.metrics import MetricsFile

    original = MetricsFile._write_waiting

    def trapped(metrics):
        if trap.is_set:
            metrics._file.write(metrics._waiting[:25])
            trap()
        original(metrics)

    MetricsFile._write_waiting = trapped


def _before_the_summary(trap: _Trap) -> None:
    from est_cli.runs.directory import RunDirectory

    _before(RunDirectory, "write_summary", trap)


PLACES: dict[str, Callable[[_Trap], None]] = {
    "in a gradient accumulation": _in_accumulation,
    "in the optimizer": _in_the_optimizer,
    "in an evaluation": _in_evaluation,
    "on a stage boundary": _on_a_boundary,
    "in a checkpoint's file": _in_a_checkpoint_file,
    "before a checkpoint's rename": _before_the_checkpoints_rename,
    "after a checkpoint's rename": _after_the_checkpoints_rename,
    "while an old checkpoint is removed": _while_an_old_checkpoint_is_removed,
    "in a line of metrics.jsonl": _in_a_line_of_metrics,
    "before the summary": _before_the_summary,
}
