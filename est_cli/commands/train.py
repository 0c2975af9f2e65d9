"""est-train: one run, or with -m a sweep."""

import argparse
import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from est_cli import runs, training
from est_cli.commands import entry
from est_cli.composition.composer import Composer, plain
from est_cli.composition.typed_text import typed_keys
from est_cli.config import TrainConfig
from est_cli.errors import DONE, UserError
from est_cli.experiments import sweep
from est_cli.experiments.arms import read_config
from est_cli.runs.cooldown import Trunk, cooldown_config
from est_cli.runs.directory import RunDirectory
from est_cli.runs.rerun import recorded_config
from est_cli.runs.stopping import quit_until_training_begins

_REPLAY = "replay="


def main() -> None:
    arguments = entry.read_arguments(_add_flags)
    quit_until_training_begins()
    entry.exit_with(lambda: _command(arguments))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that Hydra does not know: which recorded config is the primary one."""
    parser.add_argument("--rerun", metavar="DIR")
    parser.add_argument("--cooldown", metavar="CHECKPOINT")


def _command(arguments: argparse.Namespace) -> int:
    replays = [text.removeprefix(_REPLAY) for text in arguments.overrides if text.startswith(_REPLAY)]
    arguments.overrides = [text for text in arguments.overrides if not text.startswith(_REPLAY)]
    with Composer(primary_config(arguments), arguments) as composer:
        if entry.answers_flag(composer):
            return DONE
        if replays:
            runs.replay.run(replays[-1], composer)
            return DONE
        return _train(composer)


def primary_config(arguments: argparse.Namespace) -> str:
    """The name of the config that overrides change: `train`, or one made from --rerun or --cooldown.

    Raises UserError.
    """
    makers = {"rerun": recorded_config, "cooldown": cooldown_config}
    given = {flag: path for flag in makers if (path := getattr(arguments, flag, None)) is not None}
    if arguments.config_name is not None and given:
        raise UserError(
            *(
                f"--config-name={arguments.config_name}: goes without --{flag}, whose run is the config; leave one out"
                for flag in given
            )
        )
    if len(given) > 1:
        raise UserError("--rerun, --cooldown: only one of them at a time")
    if not given:
        return "train"
    ((flag, path),) = given.items()
    return makers[flag](path, arguments.overrides)


def _train(composer: Composer) -> int:
    """A run or a sweep. Every mistake in the input is found before there is a run directory."""
    peers = training.distributed.meet()
    found = peers.agree("config", lambda: _read(composer, peers.size))
    if found is None:
        return sweep.run(composer)
    config, notes, trunk, run_dir = found
    if config.trainer.devices > peers.size:
        return runs.launcher.launch(config.trainer.devices, ["-m", "est_cli", *sys.argv[1:]])
    directory = RunDirectory(Path(peers.from_main("directory", str(run_dir))))
    overrides, job = composer.arguments.overrides, runs.run.Job.of_environment()
    run = runs.run.prepare(config, notes, trunk, directory, overrides, peers, job)
    return composer.run(lambda _: run.execute()) if peers.is_main else run.execute()


def _read(composer: Composer, size: int) -> tuple[TrainConfig, list[str], Trunk | None, Path] | None:
    """What `read_config` returns, and the run directory; None for a sweep."""
    config = composer.compose_run()
    if config is None:
        if size > 1:
            raise UserError(f"-m: {size} processes were started; a sweep starts those of its jobs itself")
        return None
    config = _after_finished_runs(composer, config)
    return *read_config(plain(config), config.hydra), Path(config.hydra.run.dir).absolute()


def _after_finished_runs(composer: Composer, config: DictConfig) -> DictConfig:
    """The config with a free run_id, if the run is named by its Slurm job and another run of the job is finished.

    A requeued job has the same number, so it continues its run. A second run in the same allocation, typed after the
    first has finished, is named JOB-2.
    """
    typed, number = composer.arguments.overrides, 2
    named = {"run_id", "hydra.run.dir"} & set(typed_keys(typed))
    if named or "SLURM_JOB_ID" not in os.environ or "SLURM_RESTART_COUNT" in os.environ:
        return config
    job = config.get("run_id")
    while (run_dir := Path(config.hydra.run.dir)).name == config.get("run_id") and RunDirectory(run_dir).is_finished:
        composer.arguments.overrides = [*typed, f"run_id='{job}-{number}'"]
        config = composer.compose()
        number += 1
    return config
