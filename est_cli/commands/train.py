"""est-train: validate, prepare the data, and hand over to the run."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from est_cli.commands import entry, replay, sweep
from est_cli.commands.arms import with_arm
from est_cli.commands.composition import config_of_flags, plain
from est_cli.commands.cooldown import Trunk, take_trunk
from est_cli.commands.rerun import typed_keys
from est_cli.commands.run import Prepared, execute, stop_request
from est_cli.commands.run_directory import RunDirectory, continue_command, make_folder
from est_cli.commands.stopping import quit_until_training_begins
from est_cli.commands.typed_text import quoted
from est_cli.config import TrainConfig, auto, read_train_config
from est_cli.errors import RunFailed, UserError

if TYPE_CHECKING:
    from est_cli.data.tokens import TokenStore
    from est_cli.training.peers import Peers

_COMPOSING_FLAGS = ("config_dir", "config_name", "rerun", "cooldown")
"""Flags that decide what is composed."""
_JOB = "EST_JOB"
"""Environment variable of the ranks of a sweep's job: its label, and what continues the sweep, as JSON."""


def main() -> None:
    arguments = entry.read_arguments(trains=True)
    if entry.asks_hydra(arguments):
        entry.exit_with(lambda: _explain(arguments))
    if (folder := replay.take_folder(arguments)) is not None:
        entry.exit_with(lambda: replay.run(folder, arguments))
    quit_until_training_begins()
    entry.exit_with(lambda: _sweep(arguments) if sweep.is_sweep(arguments) else _run(arguments))


def _sweep(arguments: Any) -> int:
    return sweep.run(arguments, job_of_sweep, read_config)


def _explain(arguments: Any) -> None:
    """--help, --cfg and --info are Hydra's own words; it does not know --rerun and --cooldown."""
    name = config_of_flags(arguments) or "train"
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    entry.add_own_flags(ours)
    sys.argv[1:] = ours.parse_known_args()[1]
    entry.hand_to_hydra(name, arguments, lambda _: None)


def _run(arguments: Any) -> int:
    """One run. Everything that can be wrong with the input is found before Hydra makes a directory."""
    from est_cli.training.peers import meet

    peers = meet()
    composed, hydra_node = peers.agree("composition", lambda: _compose(arguments))
    trunk = peers.agree("trunk", lambda: take_trunk(composed))
    config, notes = peers.agree("config", lambda: read_config(composed, hydra_node))
    if config.trainer.devices > peers.size:
        from est_cli.commands.launcher import launch

        return launch(config.trainer.devices, ["-m", "est_cli", *sys.argv[1:]])
    directory = RunDirectory(Path(peers.from_main("directory", str(Path(hydra_node.run.dir).absolute()))))
    job = json.loads(os.environ.get(_JOB, "{}"))
    prepared = _prepare(config, notes, directory, arguments.overrides, peers, trunk, job.get("label"))
    if job:
        prepared = replace(prepared, command=job["command"], job=True)
    peers.agree("folder", lambda: make_folder(directory.path, "hydra.run.dir") if peers.is_main else None)
    if not peers.is_main:
        return execute(prepared, peers)
    return entry.run_in_directory("train", arguments, lambda _: execute(prepared, peers))


def _compose(arguments: Any) -> tuple[dict[str, Any], DictConfig]:
    """The composed config and Hydra's node.

    A run is named by its Slurm job, so that a requeued job continues it. A second run in the same allocation, typed
    after the first has finished, is named JOB-2.
    """
    composed, node = entry.compose("train", arguments)
    job, number = composed.get("run_id"), 2
    given = {"run_id", "hydra.run.dir"} & set(typed_keys(arguments.overrides))
    if given or "SLURM_JOB_ID" not in os.environ or "SLURM_RESTART_COUNT" in os.environ:
        return composed, node
    typed = arguments.overrides
    while RunDirectory(Path(node.run.dir)).is_finished and composed["run_id"] == Path(node.run.dir).name:
        arguments.overrides = [*typed, f"run_id='{job}-{number}'"]
        composed, node = entry.compose("train", arguments)
        number += 1
    return composed, node


def _prepare(
    config: TrainConfig,
    notes: list[str],
    directory: RunDirectory,
    overrides: list[str],
    peers: "Peers",
    trunk: Trunk | None = None,
    label: str | None = None,
) -> Prepared:
    """What a run needs. Rank 0 alone looks into the directory and tells of the run, and is the first at the data."""
    from est_cli.tracking.trackers import trackers_for

    is_main = peers.is_main
    changes = peers.agree("changes", lambda: directory.check(config) if is_main else [])
    if trunk is not None:
        begins = is_main and not directory.has_checkpoints
        peers.agree("cooldown", lambda: _check_trunk(trunk, config, begins))
        notes = [trunk.note(config), *notes]
    trackers = peers.agree("trackers", lambda: trackers_for(config, label) if is_main else [])
    begun = peers.from_main("begun", _begun(directory, trunk) if is_main else None)
    store = peers.agree("data", lambda: _tokens(config, begun, quiet=not is_main), main_first=True)
    command = continue_command(sys.argv[1:], config)
    return Prepared(config, directory, store, overrides, command, notes + changes, trackers, trunk=trunk, label=label)


def _begun(directory: RunDirectory, trunk: Trunk | None) -> str | None:
    """The folder of the run that this one goes on from: its own, or that of its trunk."""
    if directory.has_checkpoints:
        return str(directory.path)
    return None if trunk is None else str(trunk.run_dir)


def _check_trunk(trunk: Trunk, config: TrainConfig, begins: bool) -> None:
    """A cooldown that goes on from a checkpoint of its own does not need the trunk's any more."""
    trunk.check(config)
    if begins:
        trunk.verify()


def job_of_sweep(composed: DictConfig, directory: RunDirectory, call: sweep.Call) -> float:
    """One job of a sweep, whose directory Hydra has made; the validation loss. A finished job is not run again."""
    if call.is_elsewhere:
        sys.argv[:] = call.arguments
        if stop_request()():
            raise SystemExit(entry.STOPPED)
    from hydra.core.hydra_config import HydraConfig

    from est_cli.training.peers import Peers, launched_ranks

    node = HydraConfig.get()
    composed = plain(composed)
    trunk = take_trunk(composed)
    config, notes = read_config(composed, node)
    if launched_ranks() > 1:
        raise UserError(f"-m: {launched_ranks()} processes were started; a sweep starts those of its jobs itself")
    group = config.logger.group or Path(node.sweep.dir).name
    config = replace(config, logger=replace(config.logger, group=group))
    if directory.is_done(config):
        _check_text(directory, config)
        entry.say(f"{directory.path.name}: done already, skipped")
        return directory.summary()["val_loss"]
    entry.say(f"{directory.path.name}: job {node.job.num + 1}")
    if config.trainer.devices > 1:
        return _job_of_ranks(node, config.trainer.devices, group, directory, call)
    label = directory.path.name if call.is_elsewhere else None
    prepared = _prepare(config, notes, directory, list(node.overrides.task), Peers(), trunk, label)
    code = execute(replace(prepared, command=call.command, job=True), Peers())
    if code != entry.DONE:
        raise SystemExit(code)
    return directory.summary()["val_loss"]


def _check_text(directory: RunDirectory, config: TrainConfig) -> None:
    """Raises UserError where a job that is done trained on another text than the jobs after it would."""
    from est_cli.data.run_data import RunData
    from est_cli.data.tokens import current_text

    done = RunData(directory.path, config.tokenizer.kind)
    if done.text is not None and config.data.on_change == "refuse":
        done.check(current_text(config.data), config.data, entry.say)


def _job_of_ranks(node: DictConfig, count: int, group: str, directory: RunDirectory, call: sweep.Call) -> float:
    """A job of a sweep on several devices: a run of its own, in the job's folder."""
    from est_cli.commands.launcher import launch

    flags = vars(entry.read_arguments(trains=True))
    kept = [f"--{name.replace('_', '-')}={flags[name]}" for name in _COMPOSING_FLAGS if flags[name] is not None]
    folder, group = (quoted(text) for text in (str(directory.path), group))
    paths = [override for override in node.overrides.hydra if override.startswith("hydra.searchpath=")]
    overrides = [*paths, *node.overrides.task, f"++logger.group={group}", "hydra.mode=RUN", f"hydra.run.dir={folder}"]
    job = json.dumps({"label": directory.path.name, "command": call.command})
    code = launch(count, ["-m", "est_cli", *kept, *overrides], {_JOB: job})
    if code in (entry.STOPPED, entry.INTERRUPTED):
        raise SystemExit(code)
    if code == entry.BAD_INPUT:
        raise UserError(f"{directory.path.name}: its processes have told what is wrong")
    if code != entry.DONE:
        raise RunFailed(directory.error() or f"its processes ended with code {code}")
    return directory.summary()["val_loss"]


def read_config(composed: dict[str, Any], hydra_node: DictConfig) -> tuple[TrainConfig, list[str]]:
    """The config with numbers that suit this machine's device, and what was chosen. Raises UserError."""
    arm, flops = composed.pop("arm", None), composed.pop("arm_flops", None)
    config = read_train_config(composed)
    from est_cli.subnet.sampler import check_strategy
    from est_cli.training.device import available_device
    from est_cli.training.pretrained import check_pretrained

    if config.model.init_from is not None:
        check_pretrained(config.model)
    config, notes = auto.choose(config, available_device(config.trainer, config.kernels))
    check_strategy(config)
    if arm is None:
        return config, notes
    return with_arm(config, arm, flops, hydra_node.runtime.choices.get("scheduler")), notes


def _tokens(config: TrainConfig, begun: str | None, quiet: bool = False) -> "TokenStore":
    """The token files to train on; of a run that has begun, those of the text that it began with."""
    from est_cli.data.run_data import RunData
    from est_cli.data.tokens import prepare

    say = (lambda message: None) if quiet else entry.say
    show_progress = not quiet and sys.stderr.isatty()
    run = None if begun is None else RunData(Path(begun), config.tokenizer.kind)
    check = (lambda text: None) if run is None else (lambda text: run.check(text, config.data, say))
    store = prepare(config.data, config.tokenizer, config.model.vocab_size, say, show_progress, run, check)
    store.check(config.data.seq_len, config.sequences_per_step)
    return store
