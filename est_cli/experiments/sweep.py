"""est-train -m: one folder for the sweep, one for each job. The same command runs what failed or never ran."""

import contextlib
import functools
import multiprocessing
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from rich.console import Console

from est_cli import data, runs, training
from est_cli.composition.composer import Composer, plain
from est_cli.composition.hydra_internals import launcher
from est_cli.composition.typed_text import quoted
from est_cli.config import TrainConfig
from est_cli.errors import BAD_INPUT, DONE, INTERRUPTED, STOPPED, RunFailed, UserError, problems_text, say
from est_cli.experiments.arm_jobs import UNNAMED_KEYS, ComparisonJobs, Launch, side_by_side
from est_cli.experiments.arms import read_config
from est_cli.experiments.naming import SweepRequest
from est_cli.experiments.result import SweepResult
from est_cli.plugins import require_package
from est_cli.runs.directory import RunDirectory, make_folder, program
from est_cli.runs.stopping import STOP_SIGNALS, handlers_restored, stop_request

_COMPOSING_FLAGS = ("config_dir", "config_name", "rerun", "cooldown")
"""Flags that decide what is composed."""


def run(composer: Composer) -> int:
    """Run the sweep's jobs, then show all of them; returns the exit code. Raises UserError before any job has begun."""
    given = {flag: getattr(composer.arguments, flag) for flag in _COMPOSING_FLAGS}
    flags = tuple(f"--{flag.replace('_', '-')}={value}" for flag, value in given.items() if value is not None)
    call = Call(tuple(sys.argv), flags, shlex.join([*program(), *sys.argv[1:]]), os.getpid())
    master = composer.compose_sweep()
    asked = SweepRequest(master)
    _check_installed(master)
    comparison = None if asked.arms is None else ComparisonJobs.of(composer, master)
    directory = Path(master.hydra.sweep.dir).absolute()
    # The folder's name is a digest of the overrides, which are extended below, so it is fixed here.
    overrides = [*composer.arguments.overrides, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={quoted(str(directory))}"]
    fixed = [key for key, override in asked.overrides.items() if not override.is_sweep_override()]
    if comparison is not None:
        fixed += UNNAMED_KEYS
        launcher_given = any(override.startswith("hydra/launcher=") for override in overrides)
        if together := side_by_side(comparison, master, launcher_given):
            overrides += together
            comparison = comparison.on_one_thread_each()
        comparison.show_cost(Console(stderr=True))
    overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(quoted, fixed))}]")
    master = composer.compose_master(overrides)
    task = functools.partial(run_job, call)
    make_folder(directory, "hydra.sweep.dir")
    stopped: int | None = None
    try:
        with _signals_for_workers(master) as received:
            if comparison is None:
                composer.hydra.multirun(composer.config_name, task, overrides)
            else:
                comparison.run(_launch(launcher(composer.hydra, master, task), received))
        stopped = STOPPED if received else None
    except SystemExit as error:
        stopped = int(error.code or DONE)
    result = SweepResult.of(directory, asked.swept, at_a_time=_at_a_time(master))
    result.show(master.format)
    code = result.exit_code if stopped is None else stopped
    if stopped is not None or code == STOPPED:
        say(f"continue with: {call.command}")
    return code


def _check_installed(master: DictConfig) -> None:
    """Raises UserError if the launcher or the sweeper is an extra that is not installed."""
    for kind in ("launcher", "sweeper"):
        option = master.hydra.runtime.choices[f"hydra/{kind}"]
        package, extra = master.hydra[kind]._target_.rpartition(".")[0], option.partition("_")[0]
        require_package(package, f"hydra/{kind}={option}", f"est-cli[{extra}]", f"hydra/{kind}=basic")


def _launch(launcher: Launcher, received: list[int]) -> Launch:
    """A function that launches jobs, numbered on from those of its last call. It returns None after a signal."""
    begun = 0

    def launch(jobs: Sequence[Sequence[str]]) -> list[Path] | None:
        nonlocal begun
        first, begun = begun, begun + len(jobs)
        returned = launcher.launch(jobs, initial_job_idx=first) if jobs else []
        return None if received else [Path(job.hydra_cfg.hydra.runtime.output_dir) for job in returned]

    return launch


def _at_a_time(master: DictConfig) -> int | None:
    """How many jobs this machine runs at a time; None if the launcher does not tell."""
    if (option := master.hydra.runtime.choices["hydra/launcher"]) == "basic":
        return 1
    n_jobs = master.hydra.launcher.n_jobs if option == "joblib" else 0
    return n_jobs if n_jobs > 0 else None


@contextlib.contextmanager
def _signals_for_workers(master: DictConfig) -> Iterator[list[int]]:
    """Signals that came while joblib's workers train: they write their checkpoints, and this process waits for that.

    A terminal sends Ctrl-C to the workers as well; other signals are passed on. Jobs in this process stop by
    themselves, and Slurm stops its own.
    """
    received: list[int] = []
    if master.hydra.runtime.choices["hydra/launcher"] != "joblib":
        yield received
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)
        for worker in multiprocessing.active_children() if number != signal.SIGINT else ():
            os.kill(worker.pid, number)

    with handlers_restored():
        for number in STOP_SIGNALS:
            signal.signal(number, pass_on)
        yield received


@dataclass(frozen=True)
class Call:
    """How the sweep was called. A launcher sends it with every job to the process that runs the job."""

    arguments: tuple[str, ...]
    """sys.argv"""
    flags: tuple[str, ...]
    """Those of its flags that decide what is composed, such as --config-dir."""
    command: str
    """The command line that continues the sweep."""
    process: int
    """Id of the sweep's own process."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether this process runs a job for the sweep's own process."""
        return os.getpid() != self.process


def run_job(call: Call, composed: DictConfig) -> float | None:
    """Train one job and return its validation loss. A failure is told at once and left in the job's folder.

    The other jobs go on. A failure returns None, because Optuna's sweeper accepts neither a loss of NaN nor an
    exception. Raises SystemExit when asked to stop.
    """
    directory = RunDirectory(Path(HydraConfig.get().runtime.output_dir))
    try:
        return _train(call, composed, directory)
    except SystemExit:
        if not call.is_elsewhere:
            raise
        return None  # its folder tells that it was stopped, and the sweep's own process why
    except UserError as error:
        text = problems_text(error)
    except RunFailed as error:
        text = f"failed: {error}"
    except Exception:
        text = traceback.format_exc()
    say(f"{directory.path.name} failed\n{text}")
    directory.write_error(text + "\n")
    return None


def _train(call: Call, composed: DictConfig, directory: RunDirectory) -> float:
    """Train the job, unless it is done already. Raises SystemExit if it did not end with DONE."""
    if call.is_elsewhere:
        sys.argv[:] = call.arguments
        if stop_request()():
            raise SystemExit(STOPPED)
    node, name = HydraConfig.get(), directory.path.name
    config, notes, trunk = read_config(plain(composed), node)
    group = config.logger.group or Path(node.sweep.dir).name
    config = replace(config, logger=replace(config.logger, group=group))
    if directory.was_finished_with(config):
        _check_text(directory, config)
        say(f"{name}: done already, skipped")
        return directory.summary()["val_loss"]
    say(f"{name}: job {node.job.num + 1}")
    in_ranks = config.trainer.devices > 1
    job = runs.run.Job(call.command, name if in_ranks or call.is_elsewhere else None)
    if in_ranks:
        code = _run_in_ranks(config, directory, call.flags, job)
    else:
        no_peers, overrides = training.distributed.Peers(), list(node.overrides.task)
        code = runs.run.prepare(config, notes, trunk, directory, overrides, no_peers, job).execute()
    if code != DONE:
        raise SystemExit(code)
    return directory.summary()["val_loss"]


def _check_text(directory: RunDirectory, config: TrainConfig) -> None:
    """Raises UserError if a finished job trained on another text than the jobs after it would."""
    done = data.run_data.RunData(directory.path, config.tokenizer.kind)
    if done.text is not None and config.data.on_change == "refuse":
        done.check(data.tokens.current_text(config.data), config.data, say)


def _run_in_ranks(config: TrainConfig, directory: RunDirectory, flags: tuple[str, ...], job: "runs.run.Job") -> int:
    """A job on several devices: a run of its own, in the job's folder. Returns DONE, STOPPED or INTERRUPTED."""
    node, folder, group = HydraConfig.get(), quoted(str(directory.path)), quoted(config.logger.group)
    paths = [override for override in node.overrides.hydra if override.startswith("hydra.searchpath=")]
    overrides = [*paths, *node.overrides.task, f"++logger.group={group}", "hydra.mode=RUN", f"hydra.run.dir={folder}"]
    code = runs.launcher.launch(config.trainer.devices, ["-m", "est_cli", *flags, *overrides], job.as_environment())
    if code == BAD_INPUT:
        raise UserError(f"{directory.path.name}: its processes have told what is wrong")
    if code not in (DONE, STOPPED, INTERRUPTED):
        raise RunFailed((directory.error() or "").strip() or f"its processes ended with code {code}")
    return code
