"""The jobs of a comparison, `arms=[…]`: every arm on the same seeds, each with a grid of optimizer settings of its own.

The first seed runs the whole grid, later seeds run an arm only at the setting that was best for it there.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from est_cli.composition.composer import Composer, plain
from est_cli.config import TrainConfig
from est_cli.errors import UserError, nearest, say
from est_cli.experiments.arms import DENSE, EST, FULL_SAME_FLOPS, SMALL, read_config, spent
from est_cli.experiments.result import JobResult
from est_cli.plugins import is_installed
from est_cli.subnet.flops import config_ledger
from est_cli.tracking.summary import narrow_table
from est_cli.units import format_count, format_flops, format_percent

Launch = Callable[[Sequence[Sequence[str]]], Sequence[Path] | None]
"""Runs jobs, each of them a list of overrides; their folders in the same order, or None if a signal ended them."""

UNNAMED_KEYS = ("arms", "arm_flops", "scheduler", "trainer.threads")
"""Keys that the jobs' overrides have and their folders' names do not: the arm stands for them."""
AT_A_TIME = 2
SIDE_BY_SIDE = ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={AT_A_TIME}")


@dataclass(frozen=True)
class ArmJobs:
    """One arm: what its jobs share, and the cost of one."""

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig

    @property
    def full_flops(self) -> int:
        """FLOPs of as many steps of its own model, all of it trained."""
        return config_ledger(self.config).full.total * self.config.trainer.max_steps


@dataclass(frozen=True)
class ComparisonJobs:
    arms: tuple[ArmJobs, ...]
    seeds: tuple[tuple[str, ...], ...]
    """Overrides of each; one empty tuple where none is swept."""
    settings: tuple[tuple[str, ...], ...]
    """Overrides of each point of the grid of optimizer settings; one empty tuple without a grid."""
    full_flops: int
    """FLOPs of the full model for the same tokens."""

    @classmethod
    def of(
        cls,
        composer: Composer,
        master: DictConfig,
        given: Sequence[Override],
        params: Sequence[str],
    ) -> "ComparisonJobs":
        """`given` are the overrides of the command line, `params` what the config itself sweeps.

        Raises UserError, with the problems of every arm, before anything runs.
        """
        names = _names(master, composer)
        fixed, swept = _split([*OverridesParser.create(composer.loader).parse_overrides(list(params)), *given])
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
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                problems.append(f"arms: {name}: {str(error).strip().splitlines()[0]}")
            return None

        own = arm(EST)
        evolving = {name: own if name == EST else arm(name) for name in names if name not in DENSE}
        found = [jobs for jobs in (evolving or {EST: own}).values() if jobs is not None]
        if problems:
            raise UserError(*dict.fromkeys(problems))
        flops = f"+arm_flops={min(spent(jobs.config) for jobs in found)}"
        needs_flops = (FULL_SAME_FLOPS, SMALL)
        arms = [evolving.get(name) or arm(name, *([flops] if name in needs_flops else [])) for name in names]
        if problems:
            raise UserError(*problems)
        return cls(tuple(jobs for jobs in arms if jobs is not None), seeds, settings, own.full_flops)

    @property
    def on_cpu(self) -> bool:
        return all(jobs.config.trainer.device == "cpu" for jobs in self.arms)

    @property
    def tunes_first(self) -> bool:
        """Whether the first seed finds the settings of the later ones."""
        return len(self.seeds) > 1 and len(self.settings) > 1

    @property
    def runs_per_arm(self) -> int:
        return len(self.settings) + len(self.seeds) - 1 if self.tunes_first else len(self.settings) * len(self.seeds)

    def on_one_thread_each(self) -> "ComparisonJobs":
        """For jobs side by side; a number that a person has given stays."""
        arms = [
            arm if arm.config.trainer.threads else replace(arm, overrides=(*arm.overrides, "trainer.threads=1"))
            for arm in self.arms
        ]
        return replace(self, arms=tuple(arms))

    def show_cost(self, console: Console) -> None:
        table = narrow_table()
        table.add_column("arm", no_wrap=True)
        for column in ("runs", "steps", "FLOPs per run", "of full"):
            table.add_column(column, justify="right")
        total = 0
        for arm in self.arms:
            flops = spent(arm.config)
            total += flops * self.runs_per_arm
            steps, share = format_count(arm.config.trainer.max_steps), format_percent(flops / self.full_flops)
            table.add_row(arm.name, str(self.runs_per_arm), steps, format_flops(flops), share)
        console.print(table)
        runs = self.runs_per_arm * len(self.arms)
        said = f"{runs} runs, {format_flops(total)} in all. Runs that are done already are not run again."
        if self.tunes_first:
            said += (
                f" The first seed tries {len(self.settings)} settings; later seeds run each arm at its best one there."
            )
        console.print(said, highlight=False)

    def run(self, launch: Launch) -> None:
        if not self.tunes_first:
            points = itertools.product(self.seeds, self.settings, self.arms)
            launch([(*arm.overrides, *seed, *setting) for seed, setting, arm in points])
            return
        first, *later = self.seeds
        grid = list(itertools.product(self.arms, self.settings))
        folders = launch([(*arm.overrides, *first, *setting) for arm, setting in grid])
        if folders is None:
            return
        best = dict(self._best(grid, folders))
        launch([(*arm.overrides, *seed, *best[arm.name]) for seed in later for arm in self.arms if arm.name in best])

    def _best(
        self, grid: Sequence[tuple[ArmJobs, tuple[str, ...]]], folders: Sequence[Path]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Arms and their best setting of the first seed, except for those that have none or are not through."""
        for name in (arm.name for arm in self.arms):
            tried = [
                (JobResult.of(folder), setting)
                for (arm, setting), folder in zip(grid, folders, strict=True)
                if arm.name == name
            ]
            best, setting = min(tried, key=lambda pair: pair[0].val_loss)
            if any(result.status not in ("done", "failed") for result, _ in tried) or best.status != "done":
                say(f"{name}: later seeds wait, because its first seed is not through")
            else:
                yield name, setting


def swept_arms(config: DictConfig, given: Sequence[str]) -> bool:
    """Whether `arms` decides the sweep; `+arm=…` among the keys given on the command line takes its place."""
    return OmegaConf.select(config, "arms") is not None and "arm" not in given


def side_by_side(jobs: ComparisonJobs, master: DictConfig, launcher_given: bool) -> tuple[str, ...]:
    """Overrides that run two jobs at a time where nobody has chosen a launcher, and the machine can; or none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_basic = master.hydra.runtime.choices["hydra/launcher"] == "basic"
    if launcher_given or not is_basic or not jobs.on_cpu or cores < AT_A_TIME:
        return ()
    if not is_installed("hydra_plugins.hydra_joblib_launcher"):
        say("one run after another; with `pip install 'est-cli[joblib]'` two run at a time")
        return ()
    return SIDE_BY_SIDE


def _names(master: DictConfig, composer: Composer) -> list[str]:
    """The arms asked for, each once. Raises UserError for those that there are not."""
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
    """What all jobs share, and what is swept: the overrides by key, a later one in place of an earlier one.

    Raises UserError for a key that arms must share, and for a search, which has no grid.
    """
    fixed: dict[str, str] = {}
    swept: dict[str, list[str]] = {}
    problems = []
    for override in overrides:
        name = override.get_key_element()
        key = name.lstrip("+~")
        if not override.is_sweep_override():
            swept.pop(key, None)
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
    return {key: line for key, line in fixed.items() if key not in swept}, swept


def _overrides_of(name: str, fixed: dict[str, str]) -> tuple[str, ...]:
    """The shared overrides as this arm takes them: what is said of the scheduler is said of `est` and its controls."""
    if name in (EST, *DENSE):
        return (*fixed.values(), f"+arm={name}")
    shared = [line for key, line in fixed.items() if key != "scheduler" and not key.startswith("scheduler.")]
    return (*shared, f"scheduler={name}", f"+arm={name}")
