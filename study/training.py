"""Trains the runs that have no record, each in an est-train process that can be stopped and continued."""

import fcntl
import functools
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from est_cli.composition.composer import compose
from est_cli.config import TrainConfig
from est_cli.data.tokens import open_store
from est_cli.errors import DONE, UserError, say
from est_cli.experiments.arms import read_config
from est_cli.runs.directory import RunDirectory
from est_cli.runs.stopping import handlers_restored
from est_cli.subnet.flops import config_ledger
from study.grid import Arm, Run, run_of
from study.records import ROOT, Records

RUNS = ROOT / "outputs" / "study"
BASE = "experiment=study/base"
GFLOPS = 35.0
"""What one core reaches on these models while the others are busy, for estimates of how long the study takes."""
_POLL_S = 1.0


@functools.cache
def config_of(run: Run) -> TrainConfig:
    """What est-train makes of the run's overrides. Raises UserError."""
    arguments = Namespace(overrides=[BASE, *run.overrides], config_name=None, config_dir=None)
    return read_config(*compose("train", arguments))[0]


@functools.cache
def _flops_of_step(arm: Arm, size: str) -> float:
    """FLOPs of the whole model, the mean over a run."""
    config = config_of(run_of("headline", arm.name, size))
    return config_ledger(config).spent(config.trainer.max_steps).total / config.trainer.max_steps


def minutes(run: Run) -> float:
    """An estimate in minutes of one core, without evaluations."""
    return run.steps * _flops_of_step(run.arm, run.size) / (GFLOPS * 1e9 * 60)


def corpus_of(config: TrainConfig, records: Records) -> str:
    """The fingerprint of the text to train on. Raises UserError if the records are of another text."""
    store = open_store(config.data, config.tokenizer, config.model.vocab_size, say, sys.stderr.isatty())
    if records.corpus not in (None, store.fingerprint):
        raise UserError(
            f"{records.folder}: its runs were trained on another text: the packages installed there differ; "
            "install those of constraints.txt under the same Python, or use --out FOLDER for a study of your own"
        )
    return store.fingerprint


def train(runs: list[Run], records: Records, corpus: str, workers: int) -> list[Run]:
    """Train `runs` and record each as soon as it is done; returns those that failed.

    Ctrl-C or SIGTERM stops the runs after their step, with checkpoints, and is passed on as KeyboardInterrupt.
    """
    waiting, going, failed = list(runs), {}, []
    with only_study() as lock, handlers_restored():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while waiting or going:
                while waiting and len(going) < workers:
                    run = waiting.pop(0)
                    going[run] = _start(run, lock)
                time.sleep(_POLL_S)
                for run in [run for run, process in going.items() if process.poll() is not None]:
                    code = going.pop(run).returncode
                    if code == DONE:
                        records.add(run, RUNS / run.name, corpus)
                        say(f"{run.name}: done, validation loss {records.loss(run):.4f}")
                    else:
                        failed.append(run)
                        say(f"{run.name}: exit code {code}, see {_log(run)}")
        except KeyboardInterrupt:
            for process in going.values():
                process.send_signal(signal.SIGTERM)
            for process in going.values():
                process.wait()
            raise
    return failed


def _start(run: Run, lock: IO[str]) -> subprocess.Popen:
    """Start or continue a run. The process keeps the study's lock, so no second study starts while it lives."""
    folder = RUNS / run.name
    if RunDirectory(folder).is_finished:
        return subprocess.Popen([sys.executable, "-c", ""])
    say(f"{run.name}: {'goes on' if (folder / 'config.yaml').exists() else 'starts'}")
    command = [sys.executable, "-m", "est_cli", BASE, *run.overrides, f"hydra.run.dir={folder}"]
    with _log(run).open("a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, pass_fds=[lock.fileno()],
        )  # fmt: skip


def _log(run: Run) -> Path:
    return RUNS / f"{run.name}.log"


@contextmanager
def only_study() -> Iterator[IO[str]]:
    """Raises UserError if a study is training."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{RUNS}: a study trains there already, or a run that it left behind") from None
        yield lock
