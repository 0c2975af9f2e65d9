"""Runs the commands as people do, in a folder of their own: in a process of their own, or called in this one."""

import atexit
import contextlib
import glob
import importlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from est_cli import reports
from est_cli.runs.stopping import handlers_restored

MODULES = {
    "est-train": "train",
    "est-plan": "plan",
    "est-data": "data",
    "est-eval": "evaluate",
    "est-generate": "generate",
    "est-analyze": "analyze",
    "est-export": "export",
    "est-report": "report",
    "est-bench": "bench",
}

TINY = (
    "model.n_layers=4", "model.n_heads=4", "model.n_kv_heads=2", "model.d_model=16", "model.d_ff=24",
    "model.vocab_size=300", "model.max_seq_len=16", "tokenizer=byte", "logger=none", "optimizer.lr=0.01",
    "trainer.device=cpu", "trainer.batch_size=2", "trainer.eval_tokens=64", "trainer.threads=1", "data.seq_len=16",
)  # fmt: skip
"""A model that trains thirty steps in a second."""
ON_CORPUS = (*TINY, "data=text", "data.path=corpus")
"""The same on what `write_corpus` leaves in the fixture `place`."""

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [__name__, *(f"est_cli.commands.{module}" for module in MODULES.values()), "est_cli.runs.run",
     "est_cli.runs.launcher", "est_cli.runs.replay", "matplotlib.pyplot"]
)  # fmt: skip
"""A server imports all this once, uses none of it, and forks the processes: a start costs a tenth."""


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        return json.loads(self.out)


class Process(_SERVER.Process):
    """A command in a process of its own, which calls `before` first.

    Figures take three quarters of a tiny run's time: they are left out unless `figures` asks for them.
    """

    def __init__(
        self,
        command: str,
        *arguments: str,
        cwd: Path,
        before: Callable[[], None] | None = None,
        figures: bool = False,
        **environment: str,
    ):
        super().__init__()
        self._command, self._arguments, self._before, self._figures = command, arguments, before, figures
        self._cwd, self._environment = cwd, clean_environment(cwd, **environment)
        self._output = Path(tempfile.mkdtemp(prefix="est-test-"))
        self.start()

    def run(self) -> None:
        """What the process does; `start` calls this there."""
        os.chdir(self._cwd)
        os.environ.clear()
        os.environ.update(self._environment)
        for descriptor in (1, 2):
            with (self._output / str(descriptor)).open("wb") as file:
                os.dup2(file.fileno(), descriptor)
        sys.argv = [self._command, *self._arguments]
        if not self._figures:
            reports.report._draw = lambda *_: None
        if self._before is not None:
            self._before()
        try:
            _main(self._command)()
        finally:
            # As Python does when it ends; multiprocessing leaves out the second.
            threading._shutdown()
            atexit._run_exitfuncs()

    def stopped(self, number: int) -> Finished:
        os.kill(self.pid, number)
        return self.finished()

    def finished(self) -> Finished:
        self.join(300)
        if self.exitcode is None:
            self.kill()
            self.join()
        out, err = ((self._output / descriptor).read_text() for descriptor in "12")
        shutil.rmtree(self._output)
        return Finished(self.exitcode, out, err)


def run(command: str, *arguments: str, **options: Any) -> Finished:
    """Run the command to its end in a process of its own; `options` are those of Process."""
    return Process(command, *arguments, **options).finished()


def train(place: Path, *overrides: str, code: int = 0, **options: Any) -> Finished:
    """Train on the corpus in `place`, to the exit code that is given."""
    done = run("est-train", *ON_CORPUS, "format=json", *overrides, cwd=place, **options)
    assert done.code == code, done.err
    return done


def call(command: str, *arguments: str, cwd: Path, **environment: str) -> Finished:
    """`run` in this process, which takes a tenth of the time; for what does not train."""
    before = sys.argv, list(sys.path), dict(os.environ)
    out, err = io.StringIO(), io.StringIO()
    os.environ.clear()
    os.environ.update(clean_environment(cwd, **environment))
    sys.argv = [command, *arguments]
    code = None
    try:
        with (
            handlers_restored(),
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            _main(command)()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.path[:], kept = before
        os.environ.clear()
        os.environ.update(kept)
    return Finished(code, out.getvalue(), err.getvalue())


def _main(command: str) -> Callable[[], None]:
    return importlib.import_module(f"est_cli.commands.{MODULES[command]}").main


def clean_environment(cwd: Path, **environment: str) -> dict[str, str]:
    """This process's, without what a job scheduler would add, and with a cache of the test's own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "WANDB_"))}
    root = str(Path(__file__).parents[2])
    return {**kept, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache"), "PYTHONPATH": root, **environment}


def write_corpus(folder: Path) -> str:
    """A few kilobytes of text; returns the override that trains on it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        lines = [f"line {i} of file {number}: {'abcdefgh'[i % 8] * (i % 5)} = {i * number}" for i in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    return f"data.path={folder}"


def wait_for_steps(run_dir: Path, steps: int) -> None:
    """Until a run has logged that many steps. `run_dir` may be a pattern."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in map(Path, glob.glob(f"{run_dir}/metrics.jsonl")):
            if path.read_bytes().count(b"\n") >= steps:
                return
        time.sleep(0.005)
    raise AssertionError(f"{run_dir} never reached {steps} steps")


def metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything that equal runs share."""
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records]


def assert_same_bits(one: Path, other: Path) -> None:
    """Of two runs: every number but those of time, the final weights and the moments."""
    assert without_speed(metrics(one)) == without_speed(metrics(other))
    ours, theirs = (
        {path.name: path.read_bytes() for path in max((folder / "checkpoints").iterdir()).glob("*.safetensors")}
        for folder in (one, other)
    )
    assert ours == theirs and len(ours) > 0
