"""est-train: one run, or with -m a sweep."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from est_cli import runs, training
from est_cli.commands import entry
from est_cli.composition.composer import compose
from est_cli.errors import UserError
from est_cli.experiments import sweep
from est_cli.experiments.arms import read_config
from est_cli.experiments.job import AS_JOB
from est_cli.runs.cooldown import cooldown_config, take_trunk
from est_cli.runs.directory import RunDirectory, make_folder
from est_cli.runs.rerun import recorded_config, typed_keys
from est_cli.runs.stopping import quit_until_training_begins

_REPLAY = "replay="


def main() -> None:
    arguments = entry.read_arguments(_add_flags)
    if entry.asks_hydra(arguments):
        entry.exit_with(lambda: _explain(arguments))
    if (folder := _take_replay(arguments)) is not None:
        entry.exit_with(lambda: runs.replay.run(folder, primary_config(arguments), arguments))
    quit_until_training_begins()
    entry.exit_with(lambda: _train(arguments))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that Hydra does not know: which recorded config is the primary one."""
    parser.add_argument("--rerun", metavar="DIR")
    parser.add_argument("--cooldown", metavar="CHECKPOINT")


def primary_config(arguments: argparse.Namespace) -> str:
    """The name of the config that overrides change: `train`, or one made from --rerun or --cooldown.

    Raises UserError.
    """
    given = {flag: path for flag in ("rerun", "cooldown") if (path := getattr(arguments, flag, None)) is not None}
    if arguments.config_name is not None and given:
        raise UserError(
            *(
                f"--config-name={arguments.config_name}: goes without --{flag}, whose run is the config; leave one out"
                for flag in given
            )
        )
    if len(given) > 1:
        raise UserError("--rerun, --cooldown: only one of them at a time")
    make = {"rerun": recorded_config, "cooldown": cooldown_config}
    return next((make[flag](path, arguments.overrides) for flag, path in given.items()), "train")


def _take_replay(arguments: argparse.Namespace) -> str | None:
    """The value of replay=…, as it was typed, taken out of the overrides; None without one."""
    values = [text.removeprefix(_REPLAY) for text in arguments.overrides if text.startswith(_REPLAY)]
    arguments.overrides = [text for text in arguments.overrides if not text.startswith(_REPLAY)]
    return values[-1] if values else None


def _explain(arguments: argparse.Namespace) -> None:
    """--help, --cfg and --info are answered by Hydra, which does not know --rerun and --cooldown."""
    name = primary_config(arguments)
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_flags(ours)
    sys.argv[1:] = ours.parse_known_args()[1]
    entry.hand_to_hydra(name, arguments, lambda _: None)


def _train(arguments: argparse.Namespace) -> int:
    name = primary_config(arguments)
    return sweep.run(name, arguments) if sweep.is_sweep(name, arguments) else _run(name, arguments)


def _run(name: str, arguments: argparse.Namespace) -> int:
    """One run. Everything that can be wrong with the input is found before Hydra makes a directory."""
    peers = training.distributed.meet()
    composed, hydra_node = peers.agree("composition", lambda: _compose(name, arguments))
    trunk = peers.agree("trunk", lambda: take_trunk(composed))
    config, notes = peers.agree("config", lambda: read_config(composed, hydra_node))
    if config.trainer.devices > peers.size:
        return runs.launcher.launch(config.trainer.devices, ["-m", "est_cli", *sys.argv[1:]])
    directory = RunDirectory(Path(peers.from_main("directory", str(Path(hydra_node.run.dir).absolute()))))
    job = json.loads(os.environ.get(AS_JOB, "{}"))
    prepared = runs.preparation.prepare_run(
        config, notes, directory, arguments.overrides, sys.argv[1:], peers, trunk, job.get("label")
    )
    if job:
        prepared = replace(prepared, command=job["command"], job=True)
    peers.agree("folder", lambda: make_folder(directory.path, "hydra.run.dir") if peers.is_main else None)
    if not peers.is_main:
        return runs.execution.execute(prepared, peers)
    return entry.run_in_directory(name, arguments, lambda _: runs.execution.execute(prepared, peers))


def _compose(name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], DictConfig]:
    """The composed config and Hydra's node.

    A run is named by its Slurm job, so that a requeued job continues it. A second run in the same allocation, typed
    after the first has finished, is named JOB-2.
    """
    composed, node = compose(name, arguments)
    job, number = composed.get("run_id"), 2
    given = {"run_id", "hydra.run.dir"} & set(typed_keys(arguments.overrides))
    if given or "SLURM_JOB_ID" not in os.environ or "SLURM_RESTART_COUNT" in os.environ:
        return composed, node
    typed = arguments.overrides
    while RunDirectory(Path(node.run.dir)).is_finished and composed["run_id"] == Path(node.run.dir).name:
        arguments.overrides = [*typed, f"run_id='{job}-{number}'"]
        composed, node = compose(name, arguments)
        number += 1
    return composed, node
