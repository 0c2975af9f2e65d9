"""The folder of a run: its files, its lock, and whether a run starts there, continues or is refused."""

import contextlib
import math
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import yaml

from est_cli.config import CONFIG_FILE, TrainConfig, as_plain, read_config_file, read_train_config
from est_cli.errors import PROBLEM, UserError
from est_cli.files import read_json, replacing, write_json
from est_cli.runs.changes import changes

SUMMARY, ERROR, ENVIRONMENT = "summary.json", "error.txt", "environment.json"
LOCK, HOLDER = ".lock", ".holder"
_BEFORE_A_RUN = {".hydra", ERROR, ENVIRONMENT, LOCK, HOLDER}
"""What a folder may hold before a run begins in it."""
_UNFINISHED = (f".{CONFIG_FILE}", f".{ENVIRONMENT}")
"""Beginnings of the names of temporary files, which a killed process leaves behind."""


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    @property
    def nonfinite(self) -> Path:
        return self.path / "nonfinite"

    @property
    def is_finished(self) -> bool:
        return self.summary().get("status") == "done"

    @property
    def status(self) -> str:
        """`failed` if the last attempt did, else summary.json's `done` or `stopped`, or `unfinished` without one."""
        return "failed" if self.error() is not None else self.summary().get("status", "unfinished")

    @property
    def has_bad_input(self) -> bool:
        """Whether bad input ended the last attempt."""
        return (self.error() or "").startswith(PROBLEM)

    @property
    def val_loss(self) -> float:
        """Infinite if there is none, or the last attempt failed."""
        loss = None if self.status == "failed" else self.summary().get("val_loss")
        return math.inf if loss is None or math.isnan(loss) else loss

    def _named(self, config: TrainConfig) -> tuple[str, str]:
        """For messages: what was typed to name this folder, and what to type to name another one."""
        if config.run_id == self.path.name:
            return f"run_id={config.run_id}", "another run_id"
        return f"hydra.run.dir={self.path}", "another folder"

    def check(self, config: TrainConfig) -> list[str]:
        """Refuse a folder in which a run of this config may not start or continue; returns notes on changed keys.

        Raises UserError for a finished run, for a run of another config, and for a folder of something else.
        """
        check_writable(self.path, "hydra.run.dir")
        names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        if all(name in _BEFORE_A_RUN or name.startswith(_UNFINISHED) for name in names):
            return []
        if not (self.path / CONFIG_FILE).exists():
            raise UserError(f"hydra.run.dir={self.path}: holds other files and no run; name another folder")
        if self.is_finished:
            named, other = self._named(config)
            raise UserError(
                f"{named}: this run is finished ({self.path}); name {other}, or leave it out for a fresh one. To train "
                "on from its weights: est-export run=… to=hf out=FOLDER, then model.init_from=FOLDER"
            )
        return [f"continues with a changed {line}" for line in self._harmless_changes(config)]

    @contextlib.contextmanager
    def locked(self, config: TrainConfig) -> Iterator[None]:
        """Keep a second process from training the run of this folder.

        The system releases the lock when this process ends, however it ends. Raises UserError, naming the holder, if
        another process has it, or has finished the run since it was checked.
        """
        lock, holder = filelock.FileLock(self.path / LOCK), self.path / HOLDER
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            named, other = self._named(config)
            who = "another process"
            with contextlib.suppress(OSError):
                who = holder.read_text().strip() or who
            raise UserError(
                f"{named}: {who} trains this run at the moment ({self.path}); wait for it, or name {other}"
            ) from None
        try:
            self.check(config)
            holder.write_text(f"process {os.getpid()} on {platform.node()}\n")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def was_finished_with(self, config: TrainConfig) -> bool:
        """Whether this run is finished. Raises UserError if it is, and had another config.

        Removes the error of a later attempt, which no longer says anything about the run.
        """
        if not self.is_finished:
            return False
        self._harmless_changes(config)
        (self.path / ERROR).unlink(missing_ok=True)
        return True

    def _harmless_changes(self, config: TrainConfig) -> list[str]:
        changed = [change for change in changes(self.config(), as_plain(config)) if change.key != "run_id"]
        if any(change.problem for change in changed):
            named, other = self._named(config)
            raise UserError(
                f"{named}: the run in {self.path} has another config; give the same values, or {other}",
                *(f"{change} ({change.problem or 'may change'})" for change in changed),
            )
        return [str(change) for change in changed]

    def write_config(self, config: TrainConfig) -> None:
        with replacing(self.path / CONFIG_FILE) as partial:
            partial.write_text(yaml.safe_dump(as_plain(config), sort_keys=False))

    def config(self) -> dict[str, Any]:
        """The run's plain config. Keys that are younger than the run have their defaults, which is how it trained.

        Raises UserError for a damaged file.
        """
        try:
            plain = read_config_file(self.path, "run")
        except UserError as error:
            raise UserError(
                f"{self.path / CONFIG_FILE}: is damaged; the newest checkpoint's state.json holds the config too"
            ) from error
        with contextlib.suppress(UserError):  # of another version: the comparison tells what differs
            return as_plain(read_train_config(plain))
        return plain

    def summary(self) -> dict[str, Any]:
        """summary.json, or an empty dict if there is none, or one that a power loss has emptied."""
        return read_json(self.path / SUMMARY)

    def write_summary(self, summary: dict[str, Any]) -> None:
        (self.path / ERROR).unlink(missing_ok=True)
        with replacing(self.path / SUMMARY) as partial:
            write_json(partial, summary)

    def error(self) -> str | None:
        """What ended the last attempt, if it failed."""
        file = self.path / ERROR
        return file.read_text() if file.exists() else None

    def write_error(self, text: str) -> None:
        """Write down what ended the run, if the disk has room for it."""
        with contextlib.suppress(OSError):
            (self.path / ERROR).write_text(text)


def check_writable(path: Path, key: str) -> None:
    """Raises UserError, naming the key that decides the path, if the folder cannot be made or written."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"{key}={path}: cannot be a folder, because {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key}={path}: cannot be written, because {nearest} may not be")


def make_folder(path: Path, key: str) -> None:
    """Raises UserError as `check_writable`, and if the file system does not take a file in the folder."""
    check_writable(path, key)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be written ({error.strerror})") from error


def continue_command(arguments: list[str], config: TrainConfig) -> str:
    """The command line that continues a stopped run. `arguments` are those of its own command line, flags included."""
    kept = [argument for argument in arguments if not argument.startswith("run_id=")]
    by_folder = any(argument.startswith("hydra.run.dir=") for argument in kept)
    if not by_folder:
        kept.append(f"run_id={config.run_id}")
    return shlex.join([*program(), *kept])


def program() -> list[str]:
    """How this process was called: the installed command, or python -m."""
    name = Path(sys.argv[0])
    return ["python", "-m", "est_cli"] if name.name == "__main__.py" else [name.name]
