"""The jobs of a comparison, `arms=[...]`: every arm runs on the same seeds and tries the same optimizer settings.

The first seed tries all settings. Later seeds run each arm only at the setting that was its best on the first seed.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig
from rich.console import Console

from est_cli.composition.composer import Composer, plain
from est_cli.composition.typed_text import parse
from est_cli.config import TrainConfig
from est_cli.config.auto import n_cores
from est_cli.errors import UserError, nearest, say
from est_cli.experiments.arms import DENSE, EST, FULL_SAME_FLOPS, SMALL, read_config, spent
from est_cli.experiments.naming import SweepRequest
from est_cli.experiments.verdict import arm_table
from est_cli.plugins import is_installed
from est_cli.runs.directory import RunDirectory
from est_cli.subnet.flops import config_ledger
from est_cli.units import format_count, format_flops, format_percent

Launch = Callable[[Sequence[Sequence[str]]], Sequence[Path] | None]
"""Runs jobs, each a list of overrides. Returns their folders in the same order, or None if a signal ended them."""

UNNAMED_KEYS = ("arms", "arm_flops", "scheduler", "trainer.threads")
"""Keys of the jobs' overrides that their folders' names leave out: the arm's name stands for all but the threads."""
_AT_A_TIME = 2
_SIDE_BY_SIDE = ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={_AT_A_TIME}")


@dataclass(frozen=True)
class ArmJobs:
    """One arm: the overrides that its jobs share, and the config of the first."""

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig


@dataclass(frozen=True)
class ComparisonJobs:
    arms: tuple[ArmJobs, ...]
    seeds: tuple[tuple[str, ...], ...]
    """Overrides for each seed; one empty tuple if seeds are not swept."""
    settings: tuple[tuple[str, ...], ...]
    """Overrides for each point of the grid of optimizer settings; one empty tuple without a grid."""
    full_flops: int
    """FLOPs of the full model for the same tokens."""

    @classmethod
    def of(cls, composer: Composer, master: DictConfig) -> "ComparisonJobs":
        """The jobs that a composed sweep with `arms` asks for.

        Raises UserError, with the problems of every arm, before anything runs.
        """
        if (sweeper := master.hydra.runtime.choices["hydra/sweeper"]) != "basic":
            raise UserError(
                f"hydra/sweeper={sweeper}: must be basic beside arms, which have a grid: optimizer.lr=A,B,C"
            )
        asked, names = SweepRequest(master), _names(master, composer)
        params = [parse(f"{key}={value}", composer.loader) for key, value in asked.params.items()]
        fixed, swept = _split([*params, *asked.overrides.values()])
        seeds = tuple((value,) for value in swept.pop("seed", [])) or ((),)
        settings = tuple(itertools.product(*swept.values()))
        problems: list[str] = []

        def arm(name: str, *more: str) -> ArmJobs | None:
            overrides = (*_overrides_of(name, fixed), *more)
            try:
                composed = composer.compose_job([*overrides, *seeds[0], *settings[0]])
                return ArmJobs(name, overrides, read_config(plain(composed), composed.hydra)[0])
            except UserError as error:
                problems.extend(f"arms: {name}: {problem}" for problem in error.problems)
                return None

        own = arm(EST)
        evolving = {name: own if name == EST else arm(name) for name in names if name not in DENSE} or {EST: own}
        if problems:
            raise UserError(*problems)
        flops = f"+arm_flops={min(spent(jobs.config) for jobs in evolving.values())}"
        needs_flops = (FULL_SAME_FLOPS, SMALL)
        arms = [evolving.get(name) or arm(name, *([flops] if name in needs_flops else [])) for name in names]
        if problems:
            raise UserError(*problems)
        full_flops = config_ledger(own.config).full.total * own.config.trainer.max_steps
        return cls(tuple(arms), seeds, settings, full_flops)

    @property
    def tunes_first(self) -> bool:
        """Whether the first seed finds the settings of the later ones."""
        return len(self.seeds) > 1 and len(self.settings) > 1

    @property
    def runs_per_arm(self) -> int:
        return len(self.settings) + len(self.seeds) - 1 if self.tunes_first else len(self.settings) * len(self.seeds)

    def on_one_thread_each(self) -> "ComparisonJobs":
        """For jobs side by side. A given number of threads stays."""
        one = ("trainer.threads=1",)
        arms = (arm if arm.config.trainer.threads else replace(arm, overrides=arm.overrides + one) for arm in self.arms)
        return replace(self, arms=tuple(arms))

    def show_cost(self, console: Console) -> None:
        table = arm_table("runs", "steps", "FLOPs per run", "of full")
        costs = [spent(arm.config) for arm in self.arms]
        for arm, flops in zip(self.arms, costs, strict=True):
            steps, share = format_count(arm.config.trainer.max_steps), format_percent(flops / self.full_flops)
            table.add_row(arm.name, str(self.runs_per_arm), steps, format_flops(flops), share)
        console.print(table)
        n_runs, flops = self.runs_per_arm * len(self.arms), format_flops(self.runs_per_arm * sum(costs))
        said = f"{n_runs} runs, {flops} in all. Runs that are done already are not run again."
        if self.tunes_first:
            n = len(self.settings)
            said += f" The first seed tries {n} settings; later seeds run each arm at its best one there."
        console.print(said, highlight=False)

    def run(self, launch: Launch) -> None:
        """Launch all jobs. An arm's later seeds wait until its first seed has tried every setting."""
        if not self.tunes_first:
            points = itertools.product(self.seeds, self.settings, self.arms)
            launch([(*arm.overrides, *seed, *setting) for seed, setting, arm in points])
            return
        first, *later = self.seeds
        grid = list(itertools.product(self.arms, self.settings))
        folders = launch([(*arm.overrides, *first, *setting) for arm, setting in grid])
        if folders is None:
            return
        best = {}
        for arm in self.arms:
            tried = [(RunDirectory(at), point[1]) for point, at in zip(grid, folders, strict=True) if point[0] is arm]
            run, setting = min(tried, key=lambda entry: entry[0].val_loss)
            if run.status == "done" and all(run.status in ("done", "failed") for run, _ in tried):
                best[arm.name] = setting
            else:
                say(f"{arm.name}: later seeds wait, because its first seed is not through")
        launch([(*arm.overrides, *seed, *best[arm.name]) for seed in later for arm in self.arms if arm.name in best])


def side_by_side(jobs: ComparisonJobs, master: DictConfig, launcher_given: bool) -> tuple[str, ...]:
    """Overrides that run two jobs at a time, or none.

    For CPU jobs, if the machine has the cores and nobody has chosen a launcher.
    """
    is_basic = master.hydra.runtime.choices["hydra/launcher"] == "basic"
    on_cpu = all(arm.config.trainer.device == "cpu" for arm in jobs.arms)
    if launcher_given or not is_basic or not on_cpu or n_cores() < _AT_A_TIME:
        return ()
    if not is_installed("hydra_plugins.hydra_joblib_launcher"):
        say("one run after another; with `pip install 'est-cli[joblib]'` two run at a time")
        return ()
    return _SIDE_BY_SIDE


def _names(master: DictConfig, composer: Composer) -> list[str]:
    """The arms asked for, each once. Raises UserError for unknown ones."""
    arms = master.arms
    if not isinstance(arms, ListConfig) or not len(arms):
        raise UserError(f"arms={arms}: must be a list of at least one arm: arms=[full,est]")
    names = list(dict.fromkeys(map(str, arms)))
    known = list(dict.fromkeys([EST, *DENSE, *composer.loader.get_group_options("scheduler")]))
    problems = [
        f"arms: {name}: must be one of {', '.join(known)}{nearest(name, known)}" for name in names if name not in known
    ]
    if problems:
        raise UserError(*problems)
    return names


def _split(overrides: Sequence[Override]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The overrides that all jobs share, and those that are swept, by key.

    Raises UserError for a sweep over a key that arms must share, and for a search, which has no grid.
    """
    fixed: dict[str, str] = {}
    swept: dict[str, list[str]] = {}
    problems = []
    for override in overrides:
        name = override.get_key_element()
        key = name.lstrip("+~")
        if not override.is_sweep_override():
            fixed[key] = override.input_line
        elif key == "arms":
            problems.append("arms: must be one list: arms=[full,est]")
        elif key != "seed" and not key.startswith("optimizer."):
            problems.append(f"{key}: only seed and optimizer keys can have several values beside arms, not {key}")
        elif not override.is_discrete_sweep():
            problems.append(f"{override.input_line}: must be a list of values beside arms: {key}=A,B,C")
        else:
            swept[key] = [f"{name}={value}" for value in override.sweep_string_iterator()]
    if problems:
        raise UserError(*problems)
    fixed.pop("arms", None)
    return fixed, swept


def _overrides_of(name: str, fixed: dict[str, str]) -> tuple[str, ...]:
    """The shared overrides for one arm. Those of the scheduler are for `est` and its controls only."""
    if name in (EST, *DENSE):
        return (*fixed.values(), f"+arm={name}")
    shared = [line for key, line in fixed.items() if key != "scheduler" and not key.startswith("scheduler.")]
    return (*shared, f"scheduler={name}", f"+arm={name}")
