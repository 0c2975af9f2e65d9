"""est-train -m: one folder a sweep, one folder a job. What failed or never ran runs again, what is done is skipped."""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from est_cli.composition.composer import Composer
from est_cli.composition.typed_text import quoted
from est_cli.errors import DONE, STOPPED, RunFailed, UserError, problems_text, say
from est_cli.experiments.comparison import UNNAMED_KEYS, ComparisonJobs, Launch, side_by_side, swept_arms
from est_cli.experiments.job import Call, run_job
from est_cli.experiments.result import SweepResult
from est_cli.plugins import require_package
from est_cli.runs.directory import RunDirectory, make_folder, program
from est_cli.runs.stopping import STOP_SIGNALS

_COMPOSING_FLAGS = ("config_dir", "config_name", "rerun", "cooldown")
"""Flags that decide what is composed."""
_LONGEST_NAME = 100
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9.]+|[A-Za-z0-9._]+|[A-Za-z0-9.-]+")
"""Values that a name shows as they are; `_` and `-` together could be read as the next key."""


def is_sweep(config_name: str, arguments: Any) -> bool:
    """Whether -m, or a config with hydra.mode=MULTIRUN, asks for a sweep."""
    if arguments.multirun:
        return True
    with Composer(config_name, arguments) as composer:
        return composer.is_sweep()


def run(config_name: str, arguments: Any) -> int:
    """Run the sweep's jobs, then show all of them; returns the exit code. Raises UserError before any job has begun."""
    given = {flag: getattr(arguments, flag) for flag in _COMPOSING_FLAGS}
    flags = tuple(f"--{flag.replace('_', '-')}={value}" for flag, value in given.items() if value is not None)
    call = Call(tuple(sys.argv), flags, shlex.join([*program(), *sys.argv[1:]]), os.getpid())
    stopped: int | None = None
    with Composer(config_name, arguments) as composer:
        master = composer.compose_sweep()
        _check_installed(master)
        comparison = comparison_jobs(composer, master)
        directory = Path(master.hydra.sweep.dir).absolute()
        # The jobs compose their own configs, whose overrides are other ones: the folder is settled here.
        fixed = [key for key, override in _overrides(master).items() if not override.is_sweep_override()]
        overrides = [*arguments.overrides, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={quoted(str(directory))}"]
        if comparison is not None:
            fixed += UNNAMED_KEYS
            launcher_given = any(override.startswith("hydra/launcher=") for override in arguments.overrides)
            if together := side_by_side(comparison, master, launcher_given):
                overrides += together
                comparison = comparison.on_one_thread_each()
                master = composer.compose_master(overrides)
            comparison.show_cost(Console(stderr=True))
        overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(quoted, fixed))}]")
        task = functools.partial(_guarded, call)
        make_folder(directory, "hydra.sweep.dir")
        try:
            with _signals_for_workers(master) as received:
                if comparison is None:
                    composer.hydra.multirun(composer.config_name, task, overrides)
                else:
                    comparison.run(_launch(composer.launcher(overrides, task), received))
            stopped = STOPPED if received else None
        except SystemExit as error:
            stopped = int(error.code or DONE)
    result = SweepResult.of(directory, _swept_keys(master), at_a_time=_at_a_time(master))
    result.show(master.format)
    code = result.exit_code if stopped is None else stopped
    if stopped is not None or code == STOPPED:
        say(f"continue with: {call.command}")
    return code


def comparison_jobs(composer: Composer, master: DictConfig) -> ComparisonJobs | None:
    """The jobs of `arms=[…]`; None where the sweep is another one. Raises UserError."""
    given = _overrides(master)
    if not swept_arms(master, list(given)):
        return None
    if (sweeper := master.hydra.runtime.choices["hydra/sweeper"]) != "basic":
        raise UserError(f"hydra/sweeper={sweeper}: must be basic beside arms, which have a grid: optimizer.lr=A,B,C")
    params = [f"{key}={value}" for key, value in _params(master).items()]
    return ComparisonJobs.of(composer, master, list(given.values()), params)


def _launch(launcher: Launcher, received: list[int]) -> Launch:
    """Launches jobs in several goes, whose numbers run on, until a signal comes."""
    begun = 0

    def launch(jobs: Sequence[Sequence[str]]) -> list[Path] | None:
        nonlocal begun
        first, begun = begun, begun + len(jobs)
        returned = launcher.launch(jobs, initial_job_idx=first) if jobs else []
        return None if received else [Path(job.hydra_cfg.hydra.runtime.output_dir) for job in returned]

    return launch


def _at_a_time(master: DictConfig) -> int | None:
    """How many jobs this machine runs at a time; None where the launcher does not tell."""
    if (launcher := master.hydra.runtime.choices["hydra/launcher"]) == "basic":
        return 1
    n_jobs = master.hydra.launcher.n_jobs if launcher == "joblib" else 0
    return n_jobs if n_jobs > 0 else None


def _check_installed(master: DictConfig) -> None:
    """Raises UserError where the launcher or the sweeper is an extra that is not installed."""
    for kind in ("launcher", "sweeper"):
        option = master.hydra.runtime.choices[f"hydra/{kind}"]
        package, extra = master.hydra[kind]._target_.rpartition(".")[0], option.partition("_")[0]
        require_package(package, f"hydra/{kind}={option}", f"est-cli[{extra}]", f"hydra/{kind}=basic")


@contextlib.contextmanager
def _signals_for_workers(master: DictConfig) -> Iterator[list[int]]:
    """Signals that came while joblib's workers train: they write their checkpoints, and this process waits for that.

    A terminal sends Ctrl-C to them as well; other signals are passed on. Where jobs run in this process, they have
    their own way to stop; Slurm's jobs are Slurm's.
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

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _guarded(call: Call, composed: DictConfig) -> float | None:
    """One job, whose failure is told at once and left in its folder, while the others go on.

    None is a failure: Optuna's sweeper takes a NaN neither as a loss nor as one.
    """
    directory = RunDirectory(Path(HydraConfig.get().runtime.output_dir))
    try:
        return run_job(composed, directory, call)
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
    with contextlib.suppress(OSError):
        directory.write_error(text + "\n")
    return None


def sweep_name(_root_: DictConfig) -> str:
    """`sweep-stage1_end-seed-1f0c93aa`: the swept keys, and a digest of all overrides in any order."""
    params = [f"{key}={value}" for key, value in _params(_root_).items()]
    if swept_arms(_root_, given := list(_overrides(_root_))) and "arms" not in given:
        params.append(f"arms={list(_root_.arms)}")
    overrides = sorted([*params, *_root_.hydra.overrides.task])
    config_name = OmegaConf.select(_root_, "hydra.job.config_name")
    if config_name not in (None, "train"):
        overrides.append(f"--config-name={config_name}")
    keys = "-".join(_safe(key.rpartition(".")[2]) for key in sorted(_swept_keys(_root_)))
    return "-".join(filter(None, ("sweep", keys[:60].strip("-"), _digest(overrides))))


def job_name(_root_: DictConfig) -> str:
    """`stage1_end-0.1_seed-0`: what this job does not share with the others; [A-Za-z0-9._-] alone, and unique."""
    fixed = set(_root_.hydra.job.config.override_dirname.exclude_keys)
    written = {key: _unquoted(o) for key, o in sorted(_overrides(_root_).items()) if key not in fixed}
    name = "_".join(f"{_safe(key.rpartition('.')[2])}-{_safe(value)}" for key, value in written.items()) or "job"
    if len(name) <= _LONGEST_NAME and all(map(_PLAIN_VALUE.fullmatch, written.values())):
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{_digest([f'{key}={value}' for key, value in written.items()])}"


OmegaConf.register_new_resolver("est.sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("est.job_name", job_name, replace=True)


def _swept_keys(master: DictConfig) -> set[str]:
    keys = {key for key, override in _overrides(master).items() if override.is_sweep_override()}
    keys |= {key.lstrip("+~") for key in _params(master)}
    return keys | ({"arm"} if swept_arms(master, list(_overrides(master))) else set())


def _params(config: DictConfig) -> dict[str, Any]:
    """What the config itself sweeps: hydra.sweeper.params, less the keys that the command line sets."""
    given = _overrides(config)
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return {key: value for key, value in params.items() if key.lstrip("+~") not in given}


def _overrides(config: DictConfig) -> dict[str, Override]:
    """By key; the last one where a key is given twice, as Hydra takes it."""
    parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    return {override.get_key_element().lstrip("+~"): override for override in parsed}


def _unquoted(override: Override) -> str:
    """The value as it was typed, where the quotes around it only say that it is a text."""
    written, value = override.input_line.partition("=")[2], override.value()
    return value if isinstance(value, str) and written == f"'{value}'" and _PLAIN_VALUE.fullmatch(value) else written


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
