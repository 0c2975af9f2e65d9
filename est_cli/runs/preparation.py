"""Before a run trains: numbers that suit the machine, what lies in the run directory, and data on disk."""

import sys
from dataclasses import dataclass
from pathlib import Path

from est_cli.config import TrainConfig, auto
from est_cli.data.run_data import RunData
from est_cli.data.tokens import TokenStore, prepare
from est_cli.errors import say
from est_cli.runs.cooldown import Trunk
from est_cli.runs.directory import RunDirectory, continue_command
from est_cli.subnet.sampler import check_strategy
from est_cli.tracking.tracker import Tracker
from est_cli.tracking.trackers import trackers_for
from est_cli.training.device import available_device
from est_cli.training.distributed import Peers
from est_cli.training.pretrained import check_pretrained


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train: its config holds only numbers, and its data is on disk."""

    config: TrainConfig
    directory: RunDirectory
    store: TokenStore
    overrides: list[str]
    command: str
    """The command line that continues the run after a stop."""
    notes: list[str]
    trackers: list[Tracker]
    trunk: Trunk | None = None
    """What a cooldown begins with."""
    job: bool = False
    """Whether the run is one of a sweep, which prints the result of all."""
    label: str | None = None
    """What its lines begin with when other jobs print at the same time."""

    def say(self, message: str) -> None:
        for tracker in self.trackers:
            tracker.say(message)


def for_this_machine(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The config with numbers that suit this machine's device, and what was chosen. Raises UserError."""
    if config.model.init_from is not None:
        check_pretrained(config.model)
    config, notes = auto.choose(config, available_device(config.trainer, config.kernels))
    check_strategy(config)
    return config, notes


def prepare_run(
    config: TrainConfig,
    notes: list[str],
    directory: RunDirectory,
    overrides: list[str],
    arguments: list[str],
    peers: Peers,
    trunk: Trunk | None = None,
    label: str | None = None,
) -> Prepared:
    """What a run needs. Only rank 0 looks into the directory and reports; it also prepares the data first.

    `arguments` are those that the process was called with. Raises UserError.
    """
    is_main = peers.is_main
    changes = peers.agree("changes", lambda: directory.check(config) if is_main else [])
    if trunk is not None:
        begins = is_main and not directory.has_checkpoints
        peers.agree("cooldown", lambda: _check_trunk(trunk, config, begins))
        notes = [trunk.note(config), *notes]
    trackers = peers.agree("trackers", lambda: trackers_for(config, label) if is_main else [])
    begun = peers.from_main("begun", _begun(directory, trunk) if is_main else None)
    store = peers.agree("data", lambda: _tokens(config, begun, quiet=not is_main), main_first=True)
    command = continue_command(arguments, config)
    return Prepared(config, directory, store, overrides, command, notes + changes, trackers, trunk=trunk, label=label)


def _begun(directory: RunDirectory, trunk: Trunk | None) -> str | None:
    """The folder of the run that this one continues: its own, or its trunk's."""
    if directory.has_checkpoints:
        return str(directory.path)
    return None if trunk is None else str(trunk.run_dir)


def _check_trunk(trunk: Trunk, config: TrainConfig, begins: bool) -> None:
    """A cooldown that continues from a checkpoint of its own no longer needs the trunk's."""
    trunk.check(config)
    if begins:
        trunk.verify()


def _tokens(config: TrainConfig, begun: str | None, quiet: bool = False) -> TokenStore:
    """The token files to train on; a run that has begun keeps those of the text that it began with."""
    tell = (lambda message: None) if quiet else say
    show_progress = not quiet and sys.stderr.isatty()
    run = None if begun is None else RunData(Path(begun), config.tokenizer.kind)
    check = (lambda text: None) if run is None else (lambda text: run.check(text, config.data, tell))
    store = prepare(config.data, config.tokenizer, config.model.vocab_size, tell, show_progress, run, check)
    store.check(config.data.seq_len, config.sequences_per_step)
    return store
