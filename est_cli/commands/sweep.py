"""est-train -m: one folder a sweep, one folder a job. What failed or never ran runs again, what is done is skipped."""

import contextlib
import functools
import hashlib
import json
import math
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from est_cli.commands import entry
from est_cli.commands.composition import Composer
from est_cli.commands.run_directory import RunDirectory, program
from est_cli.errors import RunFailed, UserError

Job = Callable[[DictConfig, RunDirectory, str], float]
"""Trains the composed config in the folder and returns the validation loss; the last argument is the sweep's command.

A function of a module, so that a launcher can send it to another process. Raises SystemExit when asked to stop.
"""

_LONGEST_NAME = 100
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9.]+|[A-Za-z0-9._]+|[A-Za-z0-9.-]+")
"""Values that a name shows as they are; `_` and `-` together could be read as the next key."""


def is_sweep(arguments: Any) -> bool:
    """Whether -m, or a config with hydra.mode=MULTIRUN, asks for a sweep."""
    if arguments.multirun:
        return True
    with Composer("train", arguments) as composer:
        return composer.hydra.get_mode(composer.config_name, arguments.overrides) == RunMode.MULTIRUN


def run(arguments: Any, job: Job) -> int:
    """Run the sweep's jobs, then show all of them; returns the exit code. Raises UserError before any job has begun."""
    command = shlex.join([*program(), *sys.argv[1:]])
    stopped: SystemExit | None = None
    with Composer("train", arguments) as composer:
        master = composer.compose_sweep()
        directory = Path(master.hydra.sweep.dir).absolute()
        # The jobs compose their own configs, whose overrides are other ones: the folder is settled here.
        fixed = [key for key, override in _overrides(master).items() if not override.is_sweep_override()]
        overrides = [
            *arguments.overrides,
            "hydra.mode=MULTIRUN",
            f"hydra.sweep.dir={_quoted(str(directory))}",
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(_quoted, fixed))}]",
        ]
        try:
            composer.hydra.multirun(composer.config_name, functools.partial(_guarded, job, command), overrides)
        except SystemExit as error:
            stopped = error
    from est_cli.commands.sweep_result import SweepResult

    result = SweepResult.of(directory, compared="arm" in _swept_keys(master))
    result.show(master.format)
    if stopped is None:
        return result.exit_code
    print(f"continue with: {command}", file=sys.stderr)
    return int(stopped.code or entry.DONE)


def _guarded(job: Job, command: str, composed: DictConfig) -> float:
    """One job, whose failure is told at once and left in its folder, while the others go on. NaN is a failure."""
    directory = RunDirectory(Path(HydraConfig.get().runtime.output_dir))
    try:
        return job(composed, directory, command)
    except UserError as error:
        text = entry.problems_text(error)
    except RunFailed as error:
        text = f"{entry.PROBLEM}{error}"
    except Exception:
        text = traceback.format_exc()
    print(f"{directory.path.name} failed\n{text}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        directory.write_error(text + "\n")
    return math.nan


def sweep_name(_root_: DictConfig) -> str:
    """`sweep-stage1_end-seed-1f0c93aa`: the swept keys, and a digest of all overrides in any order."""
    params = [f"{key}={value}" for key, value in _params(_root_).items()]
    overrides = sorted([*params, *_root_.hydra.overrides.task])
    config_name = OmegaConf.select(_root_, "hydra.job.config_name")
    if config_name not in (None, "train"):
        overrides.append(f"--config-name={config_name}")
    keys = "-".join(_safe(key.rpartition(".")[2]) for key in sorted(_swept_keys(_root_)))
    return "-".join(filter(None, ("sweep", keys[:60].strip("-"), _digest(overrides))))


def job_name(_root_: DictConfig) -> str:
    """`stage1_end-0.1_seed-0`: what this job does not share with the others; [A-Za-z0-9._-] alone, and unique."""
    fixed = set(_root_.hydra.job.config.override_dirname.exclude_keys)
    written = {key: o.input_line.partition("=")[2] for key, o in sorted(_overrides(_root_).items()) if key not in fixed}
    name = "_".join(f"{_safe(key.rpartition('.')[2])}-{_safe(value)}" for key, value in written.items()) or "job"
    if len(name) <= _LONGEST_NAME and all(map(_PLAIN_VALUE.fullmatch, written.values())):
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{_digest([f'{key}={value}' for key, value in written.items()])}"


OmegaConf.register_new_resolver("est.sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("est.job_name", job_name, replace=True)


def _swept_keys(master: DictConfig) -> set[str]:
    keys = {key for key, override in _overrides(master).items() if override.is_sweep_override()}
    return keys | {key.lstrip("+~") for key in _params(master)}


def _params(config: DictConfig) -> dict[str, Any]:
    """What the config itself sweeps: hydra.sweeper.params, less the keys that the command line sets."""
    given = _overrides(config)
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return {key: value for key, value in params.items() if key.lstrip("+~") not in given}


def _overrides(config: DictConfig) -> dict[str, Override]:
    """By key; the last one where a key is given twice, as Hydra takes it."""
    parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    return {override.get_key_element().lstrip("+~"): override for override in parsed}


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'"
