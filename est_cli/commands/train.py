"""est-train: validate, prepare the data, make the run directory, train, say what was saved."""

import argparse
import contextlib
import functools
import json
import shlex
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from est_cli import auto
from est_cli.commands import entry, replay, sweep
from est_cli.commands.arms import with_arm
from est_cli.commands.composition import plain
from est_cli.commands.run_directory import ENVIRONMENT, METRICS, RunDirectory, continue_command, program
from est_cli.commands.stopping import StopRequest
from est_cli.config import TrainConfig, as_plain, read_train_config
from est_cli.errors import RunFailed, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from est_cli.data.tokens import TokenStore
    from est_cli.tracking.tracker import Tracker
    from est_cli.training.distributed import World
    from est_cli.training.loop import Training
    from est_cli.training.nonfinite import NonFinite


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: its config holds numbers only, and its data is on disk."""

    config: TrainConfig
    directory: RunDirectory
    store: "TokenStore"
    overrides: list[str]
    command: str
    """The command line that goes on with the run when it has been stopped."""
    notes: list[str]
    trackers: "list[Tracker]"
    job: bool = False
    """Whether it is one of a sweep, which has the last word on standard output."""
    label: str | None = None
    """What its lines begin with where other jobs print at the same time."""

    def say(self, message: str) -> None:
        for tracker in self.trackers:
            tracker.say(message)


def main() -> None:
    arguments = entry.read_arguments(reruns=True)
    if entry.asks_hydra(arguments):
        entry.exit_with(lambda: _explain(arguments))
    if (folder := replay.take_folder(arguments)) is not None:
        entry.exit_with(lambda: replay.run(folder, arguments))
    entry.exit_with(lambda: sweep.run(arguments, job_of_sweep) if sweep.is_sweep(arguments) else _run(arguments))


def _explain(arguments: Any) -> None:
    """--help, --cfg and --info are Hydra's own words; it does not know --rerun."""
    name = "train"
    if arguments.rerun is not None:
        from est_cli.commands.rerun import recorded_config

        name = recorded_config(arguments.rerun, arguments.overrides)
        ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        ours.add_argument("--rerun")
        sys.argv[1:] = ours.parse_known_args()[1]
    entry.hand_to_hydra(name, arguments, lambda _: None)


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
        return execute(Prepared(config, directory, _tokens(config, quiet=True), [], "", [], []), world)
    directory = RunDirectory(Path(hydra_node.run.dir).absolute())
    notes += directory.check(config)
    trackers = trackers_for(config)
    command = continue_command(sys.argv[1:], config)
    prepared = Prepared(config, directory, _tokens(config), arguments.overrides, command, notes, trackers)
    world = join(config.trainer.device)
    world.from_main(str(directory.path))
    return entry.run_in_directory("train", arguments, lambda _: execute(prepared, world))


def job_of_sweep(composed: DictConfig, directory: RunDirectory, call: sweep.Call) -> float:
    """One job of a sweep, whose directory Hydra has made; the validation loss. A finished job is not run again."""
    if call.is_elsewhere:
        sys.argv[:] = call.arguments
        if _stop_request()():
            raise SystemExit(entry.STOPPED)
    from hydra.core.hydra_config import HydraConfig

    from est_cli.tracking.trackers import trackers_for
    from est_cli.training.distributed import join, launched_ranks

    node = HydraConfig.get()
    config, notes = read_config(plain(composed))
    if config.trainer.devices > 1 or launched_ranks() > 1:
        raise UserError(f"trainer.devices={config.trainer.devices}: must be 1 in a sweep")
    if config.logger.group is None:
        config = replace(config, logger=replace(config.logger, group=Path(node.sweep.dir).name))
    if directory.is_done(config):
        print(f"{directory.path.name}: done already, skipped", file=sys.stderr, flush=True)
        return directory.summary()["val_loss"]
    notes += directory.check(config)
    label = directory.path.name if call.is_elsewhere else None
    overrides, trackers = list(node.overrides.task), trackers_for(config, label)
    print(f"{directory.path.name}: job {node.job.num + 1}", file=sys.stderr, flush=True)
    prepared = Prepared(config, directory, _tokens(config), overrides, call.command, notes, trackers, True, label)
    code = execute(prepared, join(config.trainer.device))
    if code != entry.DONE:
        raise SystemExit(code)
    return directory.summary()["val_loss"]


def read_config(composed: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """The config with numbers that suit this machine's device, and what was chosen. Raises UserError."""
    arm = composed.pop("arm", None)
    config = read_train_config(composed)
    from est_cli.subnet.sampler import check_strategy
    from est_cli.training.device import available_device
    from est_cli.training.pretrained import check_pretrained

    if config.model.init_from is not None:
        check_pretrained(config.model)
    config, notes = auto.choose(config, available_device(config.trainer))
    check_strategy(config)
    return (config if arm is None else with_arm(config, arm)), notes


def _tokens(config: TrainConfig, quiet: bool = False) -> "TokenStore":
    from est_cli.data.tokens import prepare

    say = (lambda message: None) if quiet else (lambda message: print(message, file=sys.stderr, flush=True))
    show_progress = not quiet and sys.stderr.isatty()
    store = prepare(config.data, config.tokenizer, config.model.vocab_size, say, show_progress)
    store.check(config.data.seq_len, config.sequences_per_step)
    return store


def execute(prepared: Prepared, world: "World") -> int:
    """Train in the run directory, which exists; returns the exit code."""
    from est_cli.commands.provenance import git_state, write_environment
    from est_cli.tracking.metrics import iterate_metrics
    from est_cli.tracking.summary import summarize
    from est_cli.tracking.tracker import RunInfo
    from est_cli.training.checkpoint import Checkpoints
    from est_cli.training.device import keep_freed_memory
    from est_cli.training.loop import Training

    config, directory, trackers = prepared.config, prepared.directory, prepared.trackers
    code = git_state(Path(__file__).parent)
    kept = config.checkpoint
    checkpoints = Checkpoints(directory.checkpoints, kept.keep, kept.keep_best, code, config.lasting_checkpoints)
    stop_request = _stop_request()
    keep_freed_memory()
    training = Training(config, prepared.store, world, trackers)
    found = checkpoints.to_resume(config.trainer.max_steps, warn=prepared.say)
    if found is not None:
        training.restore(found)
    if not world.is_main:
        with contextlib.suppress(RunFailed):  # rank 0 tells
            return _exit_code(training.run(checkpoints, stop_request).status)
        return entry.FAILED
    directory.write_config(config)
    directory.write_tokenizer(prepared.store.tokenizer)
    write_environment(directory.path / ENVIRONMENT, prepared.overrides)
    run = RunInfo(
        directory.path,
        config,
        as_plain(config),
        training.step,
        training.stages,
        tuple(cost.total for cost in training.ledger.per_step),
        training.ledger.full.total,
        prepared.command,
    )
    for note in prepared.notes:
        prepared.say(note)
    for tracker in trackers:
        tracker.start(run)
    try:
        outcome = training.run(checkpoints, stop_request)
        summary = summarize(
            run,
            iterate_metrics(directory.path / METRICS),
            status=outcome.status,
            steps=outcome.steps,
            train_s=outcome.train_s,
            peak_memory_bytes=outcome.peak_memory_bytes,
            skipped_steps=outcome.skipped_steps,
        )
        for tracker in trackers:
            tracker.finish(outcome.status, summary)
        directory.write_summary(summary)
    except BaseException as error:
        _end_failed(prepared, training, error)
        raise
    _print_result(prepared, summary)
    return _exit_code(outcome.status)


def _exit_code(status: str) -> int:
    return entry.STOPPED if status == "stopped" else entry.DONE


def _end_failed(prepared: Prepared, training: "Training", error: BaseException) -> None:
    """Leave the reason in the run directory and tell how to go on. Raises RunFailed in the place of a known one."""
    from est_cli.training.nonfinite import NonFinite

    if isinstance(error, NonFinite):
        error = RunFailed(f"{error}; {_keep_step(prepared, training, error)}")
    elif isinstance(error, OSError):
        error = RunFailed(f"the run directory cannot be written: {error}")
    known = isinstance(error, RunFailed)
    prepared.directory.write_error(f"{error}\n" if known else traceback.format_exc())
    for tracker in prepared.trackers:
        tracker.finish("failed", None)
    if not prepared.job and not isinstance(error, Exception | SystemExit):
        prepared.say(f"quit at once; continue with: {prepared.command}")
    elif known:
        prepared.say(f"failed at step {training.step}; continue with: {prepared.command}")
        raise error


def _keep_step(prepared: Prepared, training: "Training", failed: "NonFinite") -> str:
    """What to do with a step that was not finite, and is kept where the disk takes it."""
    from est_cli.training.nonfinite import keep

    skip = "trainer.on_nonfinite=skip goes on without such steps"
    try:
        folder = keep(prepared.directory.nonfinite, failed, training.model, training.step_windows(), training.config)
    except OSError as error:
        return f"it could not be kept for a replay ({error}); {skip}"
    return f"`{shlex.join([*program(), f'replay={folder}'])}` runs it again; {skip}"


@functools.cache
def _stop_request() -> StopRequest:
    """One for the process: a signal between two jobs of a sweep is meant for the next."""
    return StopRequest()


def _print_result(prepared: Prepared, summary: dict[str, Any]) -> None:
    from est_cli.reports.report import FORMATS
    from est_cli.tracking.display import console_for
    from est_cli.tracking.summary import stage_table
    from est_cli.tracking.units import format_loss

    run_dir, console = prepared.directory.path, console_for(prepared.config.format)
    paths: dict[str, Any] = {"run directory": run_dir}
    if prepared.label is not None:
        _report(run_dir, console, ("html",))
        prepared.say(f"{summary['status']}, validation loss {format_loss(summary['val_loss'])}: {run_dir}")
        return
    if prepared.config.format != "json":
        console.print(stage_table(summary))
    elif not prepared.job:
        print(json.dumps({**summary, "run_dir": str(run_dir)}))
    if summary["status"] == "stopped" and not prepared.job:
        paths["continue with"] = prepared.command
    # A sweep ends with figures of all its jobs.
    paths |= _report(run_dir, console, ("html",) if prepared.job else FORMATS)
    for name, path in paths.items():
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)


def _report(run_dir: Path, console: "Console", formats: tuple[str, ...]) -> dict[str, Path]:
    """Writes the run's report and names its page; a disk that is full must not make a failure of a run that is done."""
    from est_cli.reports.records import load_runs
    from est_cli.reports.report import write_report

    try:
        files = write_report(load_runs([run_dir]), run_dir / "report", formats)
        return {name: files[kind] for name, kind in (("figure", "png"), ("report", "html")) if kind in files}
    except OSError as error:
        console.print(f"no report was written: {error}", soft_wrap=True, markup=False)
        return {}
