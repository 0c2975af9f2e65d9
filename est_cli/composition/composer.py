"""Composes the Hydra configuration, and reports every mistake in it as one line of a UserError."""

import argparse
import contextlib
import functools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from est_cli.composition import hydra_internals
from est_cli.composition.typed_text import parse, quoted
from est_cli.config import check_value, what_replaced
from est_cli.errors import UserError, nearest

# conf/hydra/launcher/joblib.yaml sets values of the plugin's schema of that name, as Hydra before 1.1 wanted it. Every
# process of a sweep would say so.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/joblib' is validated against ConfigStore schema")


def conf_dir() -> Path:
    """The Hydra tree: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


@functools.cache
def run_id() -> str:
    """The scheduler's job id, so that a requeued job finds its run; a fresh id without a scheduler."""
    environment = os.environ
    if job := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{job}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    if job := environment.get("SLURM_JOB_ID"):
        return job
    if (job := environment.get("TORCHELASTIC_RUN_ID", "none")) != "none":
        return job
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"


def wandb_setting(variable: str, default: str | None) -> str | None:
    """What W&B's own environment variable asks for; what is given on the command line comes before it."""
    value = os.environ.get(variable) or default
    if variable != "WANDB_MODE":
        return value
    value = {"dryrun": "offline", "run": "online"}.get(value, value)
    if value not in ("offline", "online", "disabled"):
        raise UserError(f"WANDB_MODE={value}: must be offline, online or disabled; logger.mode=... comes before it")
    return value


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    """A folder for what nobody reads: Hydra's sweeper always writes multirun.yaml. Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="est-")


OmegaConf.register_new_resolver("est.run_id", run_id, replace=True)
OmegaConf.register_new_resolver("est.scratch", lambda: _scratch().name, replace=True)
OmegaConf.register_new_resolver("est.wandb", wandb_setting, replace=True)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises UserError for flags of Hydra's that would reach nothing."""
    problems = []
    if (path := getattr(arguments, "config_path", None)) is not None:
        problems.append(
            f"--config-path={path}: the configs of est-cli are always there; --config-dir=DIR adds your own"
        )
    if getattr(arguments, "experimental_rerun", None) is not None:
        problems.append("--experimental-rerun: is not read; est-train --rerun RUN trains a recorded config again")
    if problems:
        raise UserError(*problems)


def compose(config_name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], DictConfig]:
    """The plain config, and Hydra's own node. Raises UserError."""
    with Composer(config_name, arguments) as composer:
        config = composer.compose()
        return plain(config), config.hydra


class Composer:
    """Composes one command's configuration, and runs tasks with it as Hydra does. Hydra keeps a global: use `with`."""

    def __init__(self, config_name: str, arguments: argparse.Namespace):
        _check_flags(arguments)
        self.config_name = arguments.config_name or config_name
        self.arguments = arguments

    def __enter__(self) -> "Composer":
        own = self.arguments.config_dir
        if own is not None and not os.path.isdir(own):
            raise UserError(f"--config-dir={own}: is not a folder")
        self.hydra = hydra_internals.open_hydra(str(conf_dir()), own)
        self.loader = self.hydra.config_loader
        return self

    def __exit__(self, *exception: object) -> None:
        hydra_internals.close_hydra()

    def compose(self) -> DictConfig:
        """The composed config, `hydra` node included. Raises UserError naming every bad override."""
        overrides = self.arguments.overrides
        with self._as_user_errors([overrides], sweeps=False):
            return _check_experiment(self._compose(overrides))

    def compose_run(self) -> DictConfig | None:
        """As `compose`, for est-train; None if -m, or a config with hydra.mode=MULTIRUN, asks for a sweep."""
        if self.arguments.multirun:
            return None
        try:
            config = self.compose()
        except UserError:
            # Several values of a key are a mistake, unless the config asks for a sweep.
            if self.hydra.get_mode(self.config_name, self.arguments.overrides) == RunMode.MULTIRUN:
                return None
            raise
        return None if config.hydra.mode == RunMode.MULTIRUN else config

    def compose_sweep(self) -> DictConfig:
        """The config that the jobs of a sweep share. Raises UserError naming every override that no job can compose."""
        overrides = self.arguments.overrides
        jobs = _every_value_once(overrides, self.loader)
        with self._as_user_errors(jobs):
            master = self.compose_master(overrides)
            for job in jobs:
                _check_experiment(self._compose([*job, "hydra.mode=RUN"]))
        problems: list[str] = []
        for override in (parse(text, self.loader) for text in overrides):
            if override.is_discrete_sweep():
                for value in override.sweep_iterator(transformer=Transformer.identity):
                    check_value(override.key_or_group, getattr(value, "text", value), problems)
        if problems:
            raise UserError(*problems)
        return master

    def compose_master(self, overrides: list[str]) -> DictConfig:
        """The config that the jobs of a sweep with these overrides share."""
        return self._compose(overrides, RunMode.MULTIRUN)

    def compose_job(self, overrides: list[str]) -> DictConfig:
        """One job of a sweep. Raises UserError naming every bad override."""
        with self._as_user_errors([overrides]):
            return self._compose([*overrides, "hydra.mode=RUN"])

    def _compose(self, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """Raises what Hydra raises for mistakes."""
        return self.hydra.compose_config(self.config_name, overrides, run_mode=mode)

    def run(self, task: Callable[[DictConfig], Any]) -> Any:
        """Let Hydra call `task`, with -m once for every job; returns its last result.

        After all jobs, raises the first error of `task`, without Hydra's own words.
        """
        returned, errors = [], []

        def guarded(config: DictConfig) -> None:
            try:
                returned.append(task(config))
            except Exception as error:
                errors.append(error)

        start = self.hydra.multirun if self.arguments.multirun else self.hydra.run
        start(self.config_name, guarded, self.arguments.overrides)
        if errors:
            raise errors[0]
        return returned[-1]

    @contextlib.contextmanager
    def _as_user_errors(self, jobs: list[list[str]], sweeps: bool = True) -> Iterator[None]:
        """Raises UserError instead of what Hydra, OmegaConf and the YAML reader raise for a mistake in `jobs`."""
        try:
            yield
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise UserError(f"{where}{error.problem}; YAML is indented with spaces") from error
        except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            if isinstance(error, UserError):
                raise
            problems = dict.fromkeys(line for job in jobs for line in self._problems(job, sweeps))
            raise UserError(*(problems or [_first_line(error)])) from error

    def _problems(self, overrides: list[str], sweeps: bool = True) -> Iterator[str]:
        """One line for each bad override. Several values of a key are bad unless `sweeps` is true."""
        parsed, groups_that_compose = [], []
        for text in overrides:
            try:
                parsed.append(parse(text))
            except HydraException:
                yield f"{text}: cannot be read; {_how_to_write(text)}"
        groups = [*self.loader.list_groups(""), *(f"hydra/{name}" for name in self.loader.list_groups("hydra"))]
        for override in () if sweeps else parsed:
            if override.is_sweep_override():
                key, _, values = override.input_line.partition("=")
                yield f"{override.input_line}: is a sweep; add -m to run every value, or write a list, {key}=[{values}]"
        for override in parsed:
            problem = self._group_problem(override, groups)
            if problem:
                yield problem
            elif override.key_or_group in groups:
                groups_that_compose.append(override.input_line)
        known = self._known_keys(groups_that_compose)
        for override in parsed:
            key = override.key_or_group
            if known and key not in groups and "/" not in key and not override.is_add() and key not in known:
                problem = what_replaced(key) or f"there is no such key{nearest(key, [*groups, *known])}"
                yield f"{key}: {problem}"

    def _group_problem(self, override: Override, groups: list[str]) -> str | None:
        group, value = override.key_or_group, override.value()
        if group not in groups or value is None or isinstance(value, list):
            return None
        options = self.loader.get_group_options(group)
        if value in options:
            return None
        return f"{group}={value}: must be one of {', '.join(options)}{nearest(str(value), options)}"

    def _known_keys(self, overrides: list[str]) -> list[str]:
        try:
            return list(dotted_keys(OmegaConf.to_container(self._compose(overrides))))
        except (HydraException, OmegaConfBaseException):
            return []


def _check_experiment(config: DictConfig) -> DictConfig:
    """Raises UserError for an experiment's file without its package line: its keys would change nothing."""
    if "experiment" in config:
        option = config.hydra.runtime.choices.get("experiment")
        raise UserError(f"experiment={option}: its file must begin with the line `# @package _global_`")
    return config


def _every_value_once(overrides: list[str], loader: ConfigLoader) -> list[list[str]]:
    """Overrides of the fewest jobs in which every swept value appears. Unreadable overrides stay as they are."""
    values = []
    for text in overrides:
        try:
            override = parse(text, loader)
        except HydraException:
            values.append([text])
            continue
        key = override.get_key_element()
        if override.is_discrete_sweep():
            values.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif override.is_interval_sweep():
            values.append([f"{key}={end}" for end in (override.value().start, override.value().end)])
        else:
            values.append([text])
    longest = max(map(len, values), default=1)
    return [[options[min(index, len(options) - 1)] for options in values] for index in range(longest)]


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists, without Hydra's own node and the sweep's `arms`."""
    node = OmegaConf.masked_copy(config, [key for key in config if key not in ("hydra", "arms")])
    try:
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from error
    if values.get("run_id", "") is None:
        raise UserError("run_id=null: must be a text; leave it out for a fresh one")
    return values


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The key of every section, value and list item in a tree of plain values."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield f"{prefix}{key}"
        yield from dotted_keys(child, f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].removeprefix("UserError raised while resolving interpolation: ") if lines else type(error).__name__


def _how_to_write(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or not value:
        return "write KEY=VALUE"
    return f'if the value is a text, quote it: "{key}={quoted(value)}"'
