"""est-train: validate, prepare the data, make the run directory, train, say what was saved."""

import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from est_cli import auto
from est_cli.commands import entry
from est_cli.commands.composition import plain
from est_cli.commands.run_directory import ERROR, METRICS, RunDirectory, continue_command
from est_cli.config import TrainConfig, as_plain, read_train_config

if TYPE_CHECKING:
    from est_cli.data.tokens import TokenStore
    from est_cli.tracking.tracker import Tracker
    from est_cli.training.distributed import World


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: its config holds numbers only, and its data is on disk."""

    config: TrainConfig
    directory: RunDirectory
    store: "TokenStore"
    overrides: list[str]
    notes: list[str]


def main() -> None:
    arguments = entry.read_arguments()
    if entry.needs_hydra(arguments):
        entry.hand_to_hydra("train", _job_of_sweep)
    entry.exit_with(lambda: _run(arguments))


def _run(arguments: Any) -> int:
    """One run. Everything that can be wrong with the input is found before Hydra makes a directory."""
    from est_cli.training.distributed import environment_rank, join, launched_ranks

    composed, hydra_node = entry.compose("train", arguments)
    config, notes = read_config(composed)
    if config.trainer.devices > 1 and launched_ranks() == 1:
        from est_cli.commands.processes import start_processes

        return start_processes(config.trainer.devices, sys.argv[1:])
    if environment_rank() > 0:
        world = join(config.trainer.device)
        directory = RunDirectory(Path(world.from_main(None)))
        return execute(Prepared(config, directory, _tokens(config, quiet=True), arguments.overrides, []), world)
    directory = RunDirectory(Path(hydra_node.run.dir).absolute())
    notes += directory.check(config)
    prepared = Prepared(config, directory, _tokens(config), arguments.overrides, notes)
    world = join(config.trainer.device)
    world.from_main(str(directory.path))
    codes: list[int] = []
    entry.run_hydra("train", lambda _: codes.append(execute(prepared, world)))
    return codes[0]


def _job_of_sweep(composed: DictConfig) -> int:
    """One job of a multirun: Hydra has made its directory already."""
    from hydra.core.hydra_config import HydraConfig

    from est_cli.training.distributed import join

    node = HydraConfig.get()
    config, notes = read_config(plain(composed))
    directory = RunDirectory(Path(node.runtime.output_dir))
    prepared = Prepared(config, directory, _tokens(config), list(node.overrides.task), notes)
    return execute(prepared, join(config.trainer.device))


def read_config(composed: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """The config with numbers that suit this machine's device, and what was chosen. Raises UserError."""
    config = read_train_config(composed)
    from est_cli.training.device import available_device

    return auto.choose(config, available_device(config.trainer))


def _tokens(config: TrainConfig, quiet: bool = False) -> "TokenStore":
    from est_cli.data.tokens import prepare

    say = (lambda message: None) if quiet else (lambda message: print(message, file=sys.stderr, flush=True))
    show_progress = not quiet and sys.stderr.isatty()
    store = prepare(config.data, config.tokenizer, config.model.vocab_size, say, show_progress)
    store.check(config.data.seq_len, config.sequences_per_step)
    return store


def execute(prepared: Prepared, world: "World") -> int:
    """Train in the run directory, which exists; returns the exit code."""
    from est_cli.commands.stopping import StopRequest
    from est_cli.tracking.display import console_for
    from est_cli.tracking.metrics import iterate_metrics
    from est_cli.tracking.summary import stage_table, summarize
    from est_cli.tracking.tracker import RunInfo
    from est_cli.training.checkpoint import Checkpoints
    from est_cli.training.loop import Training

    config, directory = prepared.config, prepared.directory
    console = console_for(config.format)
    trackers = _trackers(config, console) if world.is_main else []
    checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    stop_request = StopRequest()
    training = Training(config, prepared.store, world, trackers)
    found = checkpoints.newest(warn=lambda message: console.print(message, markup=False))
    if found is not None:
        training.restore(found)
    ledger = training.ledger
    run = RunInfo(
        directory.path,
        config,
        as_plain(config),
        training.step,
        ledger.stages,
        tuple(cost.total for cost in ledger.per_step),
        ledger.full.total,
        continue_command(prepared.overrides, config, directory.path),
    )
    if world.is_main:
        directory.write_config(config)
    for tracker in trackers:
        tracker.start(run)
    for note in prepared.notes:
        for tracker in trackers:
            tracker.say(note)
    try:
        outcome = training.run(checkpoints, stop_request)
    except BaseException:
        (directory.path / ERROR).write_text(traceback.format_exc())
        for tracker in trackers:
            tracker.finish("failed", None)
        raise
    if world.is_main:
        (directory.path / ERROR).unlink(missing_ok=True)
        summary = summarize(
            run,
            iterate_metrics(directory.path / METRICS),
            status=outcome.status,
            steps=outcome.steps,
            train_s=outcome.train_s,
            peak_memory_bytes=outcome.peak_memory_bytes,
        )
        directory.write_summary(summary)
        for tracker in trackers:
            tracker.finish(outcome.status, summary)
        if config.format == "json":
            print(json.dumps({**summary, "run_dir": str(directory.path)}))
        else:
            console.print(stage_table(summary))
            console.print(f"run directory: {directory.path}", soft_wrap=True, highlight=False)
        if outcome.status == "stopped":
            console.print(
                f"stopped after step {outcome.steps - 1}; continue with: {run.command}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
    return entry.STOPPED if outcome.status == "stopped" else entry.DONE


def _trackers(config: TrainConfig, console: Any) -> list["Tracker"]:
    from est_cli.tracking.display import Display
    from est_cli.tracking.metrics import MetricsFile

    display = Display(console)
    trackers: list[Tracker] = [display, MetricsFile(display.say)]
    if config.logger.kind == "wandb" and config.logger.mode != "disabled":
        from est_cli.tracking.wandb import WandbTracker

        trackers.append(WandbTracker(display.say))
    return trackers
