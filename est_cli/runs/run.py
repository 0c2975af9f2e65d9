"""One run: prepare it, train it in its directory, and tell how it ended."""

import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from est_cli.config import TrainConfig
from est_cli.data.run_data import RunData, keep_data
from est_cli.data.tokens import TokenStore, open_store
from est_cli.errors import DONE, STOPPED, PeerLost, RunFailed, UserError, say
from est_cli.reports.report import FORMATS, try_report
from est_cli.runs.cooldown import Trunk
from est_cli.runs.directory import ENVIRONMENT, RunDirectory, continue_command, make_folder, program
from est_cli.runs.provenance import git_state, write_environment
from est_cli.runs.stopping import stop_request
from est_cli.tracking.display import console_for
from est_cli.tracking.loggers import trackers_for
from est_cli.tracking.metrics import METRICS_NAME, iterate_metrics
from est_cli.tracking.summary import stage_table, summarize
from est_cli.tracking.tracker import RunInfo, Tracker
from est_cli.training.checkpoint import Checkpoint, Checkpoints
from est_cli.training.device import keep_freed_memory, return_freed_memory, set_threads
from est_cli.training.distributed import Peers, join, leave
from est_cli.training.loop import Outcome, Training
from est_cli.training.nonfinite import NonFinite, keep_step
from est_cli.training.profile import Profile
from est_cli.units import format_loss

_AS_JOB = "EST_JOB"
"""Environment variable of the ranks of a sweep's job: the `Job` as JSON."""


@dataclass(frozen=True)
class Job:
    """What a run knows about the sweep that it is a job of. The sweep prints the result of all its runs."""

    command: str
    """The command line that continues the sweep."""
    label: str | None
    """Begins each of the run's lines if other jobs print at the same time, else None."""

    @classmethod
    def of_environment(cls) -> "Job | None":
        """The job that this process is a rank of, if its parent started it as one."""
        return cls(**json.loads(os.environ[_AS_JOB])) if _AS_JOB in os.environ else None

    def as_environment(self) -> dict[str, str]:
        return {_AS_JOB: json.dumps(asdict(self))}


def prepare(
    config: TrainConfig,
    notes: list[str],
    trunk: Trunk | None,
    directory: RunDirectory,
    overrides: list[str],
    peers: Peers,
    job: Job | None = None,
) -> "Run":
    """A run that is ready to train: its data is on disk and its folder exists. All ranks call it together.

    Only rank 0 reads the directory and has trackers. It prepares the data before the other ranks open it. Raises
    UserError.
    """

    def read_directory() -> tuple[list[str], list[Tracker], Path | None]:
        """Notes, trackers, and the folder of the run that this one continues: its own, its trunk's, or None."""
        if not peers.is_main:
            return notes, [], None
        changes, continued = directory.check(config), directory.path if directory.has_checkpoints else None
        said = [*notes, *changes]
        if trunk is not None:
            trunk.check(config)
            if continued is None:  # else it no longer needs the trunk's checkpoint
                trunk.verify()
                continued = trunk.run_dir
            said = [trunk.note(config), *said]
        return said, trackers_for(config, job and job.label), continued

    said, trackers, continued = peers.agree("directory looked into", read_directory)
    continued = peers.from_main("continued", continued and str(continued))
    store = peers.agree("data", lambda: _tokens(config, continued, quiet=not peers.is_main), main_first=True)
    peers.agree("folder", lambda: make_folder(directory.path, "hydra.run.dir") if peers.is_main else None)
    command = continue_command(sys.argv[1:], config) if job is None else job.command
    return Run(config, directory, peers, store, trackers, said, overrides, command, trunk, job)


def _tokens(config: TrainConfig, continued: str | None, quiet: bool) -> TokenStore:
    """The token files to train on. A run that continues the one in folder `continued` keeps its text and tokenizer."""
    tell = (lambda message: None) if quiet else say
    show_progress = not quiet and sys.stderr.isatty()
    run = None if continued is None else RunData(Path(continued), config.tokenizer.kind)
    check = (lambda text: None) if run is None else (lambda text: run.check(text, config.data, tell))
    store = open_store(config.data, config.tokenizer, config.model.vocab_size, tell, show_progress, run, check)
    store.check(config.data.seq_len, config.sequences_per_step)
    return store


@dataclass(frozen=True)
class Run:
    """A run that is ready to train: its config holds only numbers. Only rank 0 has trackers, and writes."""

    config: TrainConfig
    directory: RunDirectory
    peers: Peers
    store: TokenStore
    trackers: list[Tracker]
    notes: list[str]
    overrides: list[str]
    command: str
    """The command line that continues the run, or its sweep, after a stop."""
    trunk: Trunk | None
    """What a cooldown begins with."""
    job: Job | None

    def execute(self) -> int:
        """Train; returns the exit code."""
        # A launcher takes the first rank whose code is not 0 for a failure, and kills those that still write.
        with self.peers.wait_for_main("run"):
            return self._execute()

    def _execute(self) -> int:
        config, directory, peers, summary = self.config, self.directory, self.peers, {}
        commit, kept = git_state(Path(__file__).parent), config.checkpoint
        checkpoints = Checkpoints(directory.checkpoints, kept.keep, kept.keep_best, commit, config.lasting_checkpoints)
        stopping = stop_request()
        keep_freed_memory() if peers.size == 1 else return_freed_memory()
        set_threads(config.trainer.threads)
        with contextlib.ExitStack() as stack:
            lock = directory.locked(config) if peers.is_main else contextlib.nullcontext()
            peers.agree("lock", lambda: stack.enter_context(lock))
            stack.enter_context(self._told_once())
            world = join(config.trainer.device, peers, config.trainer.collective_timeout_s, config.trainer.shard_size)
            training = Training(config, self.store, world, self.trackers)
            self._restore(training, checkpoints)
            info = self._begin(training) if peers.is_main else None
            profile = None
            if peers.is_main and config.trainer.profile is not None:  # one rank's traces say what all ranks do
                profile = Profile(directory.path / "profile", world.device, config.trainer.profiled, self._say)
            try:
                outcome = training.run(checkpoints, stopping, profile)
                leave()
                if peers.is_main:
                    summary = self._end(info, outcome)
            except BaseException as error:
                self._end_failed(training, error)
                raise
        if peers.is_main:
            self._print_result(summary)
        return STOPPED if outcome.status == "stopped" else DONE

    def _say(self, message: str) -> None:
        for tracker in self.trackers:
            tracker.say(message)

    def _restore(self, training: Training, checkpoints: Checkpoints) -> None:
        """Load the newest sound checkpoint, which rank 0 chooses. Every rank reads its own part of it."""
        is_main, steps = self.peers.is_main, self.config.trainer.max_steps
        if is_main and self.trunk is not None and not self.directory.has_checkpoints:
            try:
                self.trunk.begin(self.directory, self.config)
            except OSError as error:
                raise RunFailed(f"the trunk's checkpoint and metrics cannot be brought here: {error}") from error
        found = self.peers.agree("checkpoint", lambda: checkpoints.to_resume(steps, self._say) if is_main else None)
        folder = self.peers.from_main("checkpoint folder", found and str(found.folder))
        if folder is not None:
            training.restore(found or Checkpoint(Path(folder)))

    def _begin(self, training: Training) -> RunInfo:
        """Write config, data and environment into the directory, tell the notes, and start the trackers."""
        config, folder = self.config, self.directory.path
        self.directory.write_config(config)
        keep_data(folder, self.store, begins=training.step == 0)
        write_environment(folder / ENVIRONMENT, self.overrides, self.trunk)
        info = RunInfo(folder, config, training.step, training.steps.ledger, self.command)
        for note in self.notes:
            self._say(note)
        for tracker in self.trackers:
            tracker.start(info)
        return info

    def _end(self, info: RunInfo, outcome: Outcome) -> dict[str, Any]:
        """Write the summary, and return it."""
        summary = summarize(info, iterate_metrics(self.directory.path / METRICS_NAME), **vars(outcome))
        for tracker in self.trackers:
            tracker.finish(outcome.status, summary)
        self.directory.write_summary(summary)
        return summary

    def _end_failed(self, training: Training, error: BaseException) -> None:
        """Close the trackers and tell how to go on. Raises RunFailed in place of an error whose cause is known."""
        # After a loss that is not finite, the same command would fail at the same step again.
        again = "" if isinstance(error, NonFinite) else f"; continue with: {self.command}"
        if isinstance(error, NonFinite):
            error = RunFailed(f"{error}; {self._keep_step(training, error)}")
        elif isinstance(error, PeerLost):
            error = PeerLost(f"step {training.step}: {error}")
        elif isinstance(error, OSError) and self.peers.is_main:
            error = RunFailed(f"the run directory cannot be written: {error}")
        for tracker in self.trackers:
            tracker.finish("failed", None)
        if self.job is None and not isinstance(error, Exception | SystemExit):
            self._say(f"quit at once; continue with: {self.command}")
        elif isinstance(error, UserError):
            self._say(f"ended at step {training.step}; continue with: {self.command}")
        elif isinstance(error, RunFailed):
            self._say(f"failed at step {training.step}{again}")
            raise error

    def _keep_step(self, training: Training, failed: NonFinite) -> str:
        """Keep a step that was not finite for a replay; returns what to do about it. All ranks call it together."""
        what, weights = None, training.world.gathered(training.weights())
        if self.peers.is_main:
            try:
                windows = training.inputs.of_all_ranks(training.step)
                folder = keep_step(self.directory.nonfinite, failed, weights, windows, training.config)
                what = f"`{shlex.join([*program(), f'replay={folder}'])}` runs it again"
            except OSError as error:
                what = f"it could not be kept for a replay ({error})"
        # If one rank ends, all are stopped: the others end when rank 0 has written.
        what = self.peers.from_main("kept step", what)
        return f"{what}; trainer.on_nonfinite=skip goes on without such steps"

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        """One of the ranks that fail writes error.txt and raises the error; the others raise one without a message."""
        try:
            yield
        except BaseException as error:
            if self._is_told_here(error):
                known = isinstance(error, RunFailed | UserError)
                self.directory.write_error(f"{error}\n" if known else traceback.format_exc())
                raise
            if not isinstance(error, Exception):
                raise
            raise (UserError() if isinstance(error, UserError) else PeerLost()) from error

    def _is_told_here(self, error: BaseException) -> bool:
        if isinstance(error, RunFailed) and not self.peers.is_main:
            return False  # all ranks have seen it, or know only that another has ended
        return self.peers.first_to_fail() or (isinstance(error, RunFailed) and not isinstance(error, PeerLost))

    def _print_result(self, summary: dict[str, Any]) -> None:
        run_dir, job, console = self.directory.path, self.job, console_for(self.config.format)
        beside_others = job is not None and job.label is not None
        if self.config.format != "json" and not beside_others:
            console.print(stage_table(summary))
        elif job is None:
            print(json.dumps({**summary, "run_dir": str(run_dir)}))
        # A sweep ends with figures of all its jobs.
        files = try_report([run_dir], run_dir / "report", FORMATS if job is None else ("html",))
        if beside_others:
            self._say(f"{summary['status']}, validation loss {format_loss(summary['val_loss'])}: {run_dir}")
            return
        paths: dict[str, Any] = {"run directory": run_dir}
        if summary["status"] == "stopped" and job is None:
            paths["continue with"] = self.command
        if isinstance(files, str):
            paths["report"] = files
        else:
            paths |= {name: files[kind] for name, kind in (("figure", "png"), ("report", "html")) if kind in files}
        for name, path in paths.items():
            console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)
