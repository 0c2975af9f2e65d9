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
from est_cli.commands.run_directory import METRICS, RunDirectory, continue_command
from est_cli.config import TrainConfig, as_plain, read_train_config

if TYPE_CHECKING:
    from est_cli.data.tokens import TokenStore
    from est_cli.tracking.tracker import RunInfo, Tracker
    from est_cli.training.distributed import World


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: its config holds numbers only, and its data is on disk."""

    config: TrainConfig
    directory: RunDirectory
    store: "TokenStore"
    overrides: list[str]
    notes: list[str]
    trackers: "list[Tracker]"

    def say(self, message: str) -> None:
        for tracker in self.trackers:
            tracker.say(message)


def main() -> None:
    arguments = entry.read_arguments()
    if entry.needs_hydra(arguments):
        entry.hand_to_hydra("train", _job_of_sweep)
    entry.exit_with(lambda: _run(arguments))


def _run(arguments: Any) -> int:
    """One run. Everything that can be wrong with the input is found before Hydra makes a directory."""
    from est_cli.tracking.trackers import trackers_for
    from est_cli.training.distributed import environment_rank, join, launched_ranks

    composed, hydra_node = entry.compose("train", arguments)
    config, notes = read_config(composed)
    if config.trainer.devices > 1 and launched_ranks() == 1:
        from est_cli.commands.processes import start_processes

        return start_processes(config.trainer.devices, sys.argv[1:])
    if environment_rank() > 0:
        world = join(config.trainer.device)
        directory = RunDirectory(Path(world.from_main(None)))
        return execute(Prepared(config, directory, _tokens(config, quiet=True), arguments.overrides, [], []), world)
    directory = RunDirectory(Path(hydra_node.run.dir).absolute())
    notes += directory.check(config)
    trackers = trackers_for(config)
    prepared = Prepared(config, directory, _tokens(config), arguments.overrides, notes, trackers)
    world = join(config.trainer.device)
    world.from_main(str(directory.path))
    codes: list[int] = []
    entry.run_hydra("train", lambda _: codes.append(execute(prepared, world)))
    return codes[0]


def _job_of_sweep(composed: DictConfig) -> int:
    """One job of a multirun: Hydra has made its directory already."""
    from hydra.core.hydra_config import HydraConfig

    from est_cli.tracking.trackers import trackers_for
    from est_cli.training.distributed import join

    node = HydraConfig.get()
    config, notes = read_config(plain(composed))
    directory = RunDirectory(Path(node.runtime.output_dir))
    prepared = Prepared(config, directory, _tokens(config), list(node.overrides.task), notes, trackers_for(config))
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
    from est_cli.tracking.metrics import iterate_metrics
    from est_cli.tracking.summary import summarize
    from est_cli.tracking.tracker import RunInfo
    from est_cli.training.checkpoint import Checkpoints
    from est_cli.training.loop import Training

    config, directory, trackers = prepared.config, prepared.directory, prepared.trackers
    checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    stop_request = StopRequest()
    training = Training(config, prepared.store, world, trackers)
    found = checkpoints.newest(warn=prepared.say)
    if found is not None:
        training.restore(found)
    if not world.is_main:
        status = training.run(checkpoints, stop_request).status
        return entry.STOPPED if status == "stopped" else entry.DONE
    directory.write_config(config)
    run = RunInfo(
        directory.path,
        config,
        as_plain(config),
        training.step,
        training.stages,
        tuple(cost.total for cost in training.ledger.per_step),
        training.ledger.full.total,
        continue_command(prepared.overrides, config, directory.path),
    )
    for note in prepared.notes:
        prepared.say(note)
    for tracker in trackers:
        tracker.start(run)
    try:
        outcome = training.run(checkpoints, stop_request)
    except BaseException:
        directory.write_error(traceback.format_exc())
        for tracker in trackers:
            tracker.finish("failed", None)
        raise
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
    _print_result(config, summary, run)
    return entry.STOPPED if outcome.status == "stopped" else entry.DONE


def _print_result(config: TrainConfig, summary: dict[str, Any], run: "RunInfo") -> None:
    from est_cli.reports.records import load_runs
    from est_cli.reports.report import write_report
    from est_cli.tracking.display import console_for
    from est_cli.tracking.summary import stage_table

    console = console_for(config.format)
    paths = {"run directory": run.run_dir, **write_report(load_runs([run.run_dir]), run.run_dir / "report")}
    if config.format == "json":
        print(json.dumps({**summary, "run_dir": str(run.run_dir)}))
    else:
        console.print(stage_table(summary))
    if summary["status"] == "stopped":
        paths["continue with"] = run.command
    for name, path in paths.items():
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)
