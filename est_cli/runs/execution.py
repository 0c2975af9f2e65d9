"""A run in its directory: begin or continue, train, end, and say what was saved, or what went wrong."""

import contextlib
import json
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from est_cli.config import as_plain
from est_cli.data.run_data import keep as keep_data
from est_cli.errors import DONE, STOPPED, PeerLost, RunFailed, UserError
from est_cli.reports.report import FORMATS, try_report
from est_cli.runs.directory import ENVIRONMENT, METRICS, program
from est_cli.runs.preparation import Prepared
from est_cli.runs.provenance import git_state, write_environment
from est_cli.runs.stopping import stop_request
from est_cli.tracking.display import console_for
from est_cli.tracking.metrics import iterate_metrics
from est_cli.tracking.summary import stage_table, summarize
from est_cli.tracking.tracker import RunInfo
from est_cli.training.checkpoint import Checkpoint, Checkpoints
from est_cli.training.device import keep_freed_memory, return_freed_memory, set_threads
from est_cli.training.distributed import Peers, join, leave
from est_cli.training.loop import Outcome, Training
from est_cli.training.nonfinite import NonFinite, keep
from est_cli.training.profile import Profile
from est_cli.units import format_loss


def execute(prepared: Prepared, peers: Peers) -> int:
    """Train in the run directory, which exists; returns the exit code. Only rank 0 has trackers, and writes."""
    # A launcher takes the first rank whose code is not 0 for a failure, and kills those that still write.
    with peers.wait_for_main("run"):
        return _execute(prepared, peers)


def _execute(prepared: Prepared, peers: Peers) -> int:
    config, code = prepared.config, git_state(Path(__file__).parent)
    folder, kept = prepared.directory.checkpoints, config.checkpoint
    checkpoints = Checkpoints(folder, kept.keep, kept.keep_best, code, config.lasting_checkpoints)
    stopping, summary = stop_request(), {}
    keep_freed_memory() if peers.size == 1 else return_freed_memory()
    set_threads(config.trainer.threads)
    with contextlib.ExitStack() as stack:
        lock = prepared.directory.locked(config) if peers.is_main else contextlib.nullcontext()
        peers.agree("lock", lambda: stack.enter_context(lock))
        stack.enter_context(_told_by_one(prepared, peers))
        world = join(config.trainer.device, peers, config.trainer.collective_timeout_s, config.trainer.shard_size)
        training = Training(config, prepared.store, world, prepared.trackers)
        if peers.is_main and prepared.trunk is not None and not prepared.directory.has_checkpoints:
            _begin_with_trunk(prepared)
        _restore(prepared, training, checkpoints, peers)
        run = _begin(prepared, training) if peers.is_main else None
        try:
            outcome = training.run(checkpoints, stopping, _profile(prepared, training, peers))
            leave()
            if peers.is_main:
                summary = _end(prepared, run, outcome)
        except BaseException as error:
            _end_failed(prepared, training, peers, error)
            raise
    if peers.is_main:
        _print_result(prepared, summary)
    return STOPPED if outcome.status == "stopped" else DONE


def _profile(prepared: Prepared, training: Training, peers: Peers) -> Profile | None:
    """One rank's traces say what all ranks do."""
    trainer = prepared.config.trainer
    if trainer.profile is None or not peers.is_main:
        return None
    return Profile(prepared.directory.path / "profile", training.world.device, trainer.profiled, prepared.say)


def _begin_with_trunk(prepared: Prepared) -> None:
    try:
        prepared.trunk.begin(prepared.directory, prepared.config)
    except OSError as error:
        raise RunFailed(f"the trunk's checkpoint and metrics cannot be brought here: {error}") from error


def _restore(prepared: Prepared, training: Training, checkpoints: Checkpoints, peers: Peers) -> None:
    """Rank 0 says which checkpoint is sound; every rank reads of it what it holds."""
    steps = prepared.config.trainer.max_steps
    found = peers.agree("checkpoint", lambda: checkpoints.to_resume(steps, prepared.say) if peers.is_main else None)
    folder = peers.from_main("checkpoint folder", found and str(found.folder))
    if folder is not None:
        training.restore(found or Checkpoint(Path(folder)))


def _begin(prepared: Prepared, training: Training) -> RunInfo:
    """Leave in the directory what decides the run, and say what is worth it."""
    config, directory = prepared.config, prepared.directory
    directory.write_config(config)
    keep_data(directory.path, prepared.store, begins=training.step == 0)
    write_environment(directory.path / ENVIRONMENT, prepared.overrides, prepared.trunk)
    run = RunInfo(
        directory.path,
        config,
        as_plain(config),
        training.step,
        training.stages,
        tuple(cost.total for cost in training.steps.ledger.per_step),
        training.steps.ledger.full.total,
        prepared.command,
    )
    for note in prepared.notes:
        prepared.say(note)
    for tracker in prepared.trackers:
        tracker.start(run)
    return run


def _end(prepared: Prepared, run: RunInfo, outcome: Outcome) -> dict[str, Any]:
    """Write the summary, and return it."""
    summary = summarize(
        run,
        iterate_metrics(prepared.directory.path / METRICS),
        status=outcome.status,
        steps=outcome.steps,
        train_s=outcome.train_s,
        peak_memory_bytes=outcome.peak_memory_bytes,
        skipped_steps=outcome.skipped_steps,
    )
    for tracker in prepared.trackers:
        tracker.finish(outcome.status, summary)
    prepared.directory.write_summary(summary)
    return summary


def _end_failed(prepared: Prepared, training: Training, peers: Peers, error: BaseException) -> None:
    """Tell how to go on. Raises RunFailed in the place of a reason that is known."""
    # Where a loss is not finite, the same command would only come to the same step again.
    again = "" if isinstance(error, NonFinite) else f"; continue with: {prepared.command}"
    if isinstance(error, NonFinite):
        error = RunFailed(f"{error}; {_keep_step(prepared, training, peers, error)}")
    elif isinstance(error, PeerLost):
        error = PeerLost(f"step {training.step}: {error}")
    elif isinstance(error, OSError) and peers.is_main:
        error = RunFailed(f"the run directory cannot be written: {error}")
    for tracker in prepared.trackers:
        tracker.finish("failed", None)
    if not prepared.job and not isinstance(error, Exception | SystemExit):
        prepared.say(f"quit at once; continue with: {prepared.command}")
    elif isinstance(error, UserError):
        prepared.say(f"ended at step {training.step}; continue with: {prepared.command}")
    elif isinstance(error, RunFailed):
        prepared.say(f"failed at step {training.step}{again}")
        raise error


def _keep_step(prepared: Prepared, training: Training, peers: Peers, failed: NonFinite) -> str:
    """What to do with a step that was not finite, and is kept where the disk takes it. All ranks come here."""
    what, weights = None, training.world.gathered(training.weights())
    if peers.is_main:
        try:
            folder = keep(
                prepared.directory.nonfinite,
                failed,
                weights,
                training.inputs.of_all_ranks(training.step),
                training.config,
            )
            what = f"`{shlex.join([*program(), f'replay={folder}'])}` runs it again"
        except OSError as error:
            what = f"it could not be kept for a replay ({error})"
    # If one rank ends, all are stopped: the others end when rank 0 has written.
    what = peers.from_main("kept step", what)
    return f"{what}; trainer.on_nonfinite=skip goes on without such steps"


@contextlib.contextmanager
def _told_by_one(prepared: Prepared, peers: Peers) -> Iterator[None]:
    """What ends a run is told, and left in its directory, by one rank: the one that it happened to first."""
    try:
        yield
    except BaseException as error:
        if _tells(error, peers):
            known = isinstance(error, RunFailed | UserError)
            prepared.directory.write_error(f"{error}\n" if known else traceback.format_exc())
            raise
        if not isinstance(error, Exception):
            raise
        raise (UserError() if isinstance(error, UserError) else PeerLost()) from error


def _tells(error: BaseException, peers: Peers) -> bool:
    if isinstance(error, RunFailed) and not peers.is_main:
        return False  # all ranks have seen it, or know only that another has ended
    return peers.first_to_fail() or (isinstance(error, RunFailed) and not isinstance(error, PeerLost))


def _print_result(prepared: Prepared, summary: dict[str, Any]) -> None:
    run_dir, console = prepared.directory.path, console_for(prepared.config.format)
    paths: dict[str, Any] = {"run directory": run_dir}
    if prepared.label is not None:
        _report(run_dir, ("html",))
        prepared.say(f"{summary['status']}, validation loss {format_loss(summary['val_loss'])}: {run_dir}")
        return
    if prepared.config.format != "json":
        console.print(stage_table(summary))
    elif not prepared.job:
        print(json.dumps({**summary, "run_dir": str(run_dir)}))
    if summary["status"] == "stopped" and not prepared.job:
        paths["continue with"] = prepared.command
    # A sweep ends with figures of all its jobs.
    paths |= _report(run_dir, ("html",) if prepared.job else FORMATS)
    for name, path in paths.items():
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)


def _report(run_dir: Path, formats: tuple[str, ...]) -> dict[str, Path | str]:
    """Writes the run's report and names its page, or says why there is none."""
    files = try_report([run_dir], run_dir / "report", formats)
    if isinstance(files, str):
        return {"report": files}
    return {name: files[kind] for name, kind in (("figure", "png"), ("report", "html")) if kind in files}
