"""One job of a sweep: a run in the folder that Hydra made, in this process or in ranks of its own."""

import os
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from est_cli import data, runs, training
from est_cli.composition.composer import plain
from est_cli.composition.typed_text import quoted
from est_cli.config import TrainConfig
from est_cli.errors import BAD_INPUT, DONE, INTERRUPTED, STOPPED, RunFailed, UserError, problems_text, say
from est_cli.experiments.arms import read_config
from est_cli.runs.directory import RunDirectory
from est_cli.runs.stopping import stop_request


@dataclass(frozen=True)
class Call:
    """How the sweep was called. A launcher sends it with every job to the process that runs the job."""

    arguments: tuple[str, ...]
    """sys.argv"""
    flags: tuple[str, ...]
    """Those of its flags that decide what is composed, such as --config-dir."""
    command: str
    """The command line that continues the sweep."""
    process: int
    """Id of the sweep's own process."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether this process runs a job for the sweep's own process."""
        return os.getpid() != self.process


def run_job(call: Call, composed: DictConfig) -> float | None:
    """Train one job and return its validation loss. A failure is told at once and left in the job's folder.

    The other jobs go on. A failure returns None, because Optuna's sweeper accepts neither a loss of NaN nor an
    exception. Raises SystemExit when asked to stop.
    """
    directory = RunDirectory(Path(HydraConfig.get().runtime.output_dir))
    try:
        return _run(call, composed, directory)
    except SystemExit:
        if not call.is_elsewhere:
            raise
        return None  # its folder tells that it was stopped, and the sweep's own process why
    except UserError as error:
        text = problems_text(error)
    except RunFailed as error:
        text = f"failed: {error}"
    except Exception:
        text = traceback.format_exc()
    say(f"{directory.path.name} failed\n{text}")
    directory.write_error(text + "\n")
    return None


def _run(call: Call, composed: DictConfig, directory: RunDirectory) -> float:
    """Train the job, unless it is done already. Raises SystemExit if it did not end with DONE."""
    if call.is_elsewhere:
        sys.argv[:] = call.arguments
        if stop_request()():
            raise SystemExit(STOPPED)
    node, name = HydraConfig.get(), directory.path.name
    config, notes, trunk = read_config(plain(composed), node)
    group = config.logger.group or Path(node.sweep.dir).name
    config = replace(config, logger=replace(config.logger, group=group))
    if directory.was_finished_with(config):
        _check_text(directory, config)
        say(f"{name}: done already, skipped")
        return directory.summary()["val_loss"]
    say(f"{name}: job {node.job.num + 1}")
    in_ranks = config.trainer.devices > 1
    job = runs.run.Job(call.command, name if in_ranks or call.is_elsewhere else None)
    if in_ranks:
        code = _run_in_ranks(node, config.trainer.devices, group, directory, call.flags, job)
    else:
        no_peers, overrides = training.distributed.Peers(), list(node.overrides.task)
        code = runs.run.prepare(config, notes, trunk, directory, overrides, no_peers, job).execute()
    if code != DONE:
        raise SystemExit(code)
    return directory.summary()["val_loss"]


def _check_text(directory: RunDirectory, config: TrainConfig) -> None:
    """Raises UserError if a finished job trained on another text than the jobs after it would."""
    done = data.run_data.RunData(directory.path, config.tokenizer.kind)
    if done.text is not None and config.data.on_change == "refuse":
        done.check(data.tokens.current_text(config.data), config.data, say)


def _run_in_ranks(
    node: DictConfig, count: int, group: str, directory: RunDirectory, flags: tuple[str, ...], job: "runs.run.Job"
) -> int:
    """A job on several devices: a run of its own, in the job's folder. Returns DONE, STOPPED or INTERRUPTED."""
    folder, group = quoted(str(directory.path)), quoted(group)
    paths = [override for override in node.overrides.hydra if override.startswith("hydra.searchpath=")]
    overrides = [*paths, *node.overrides.task, f"++logger.group={group}", "hydra.mode=RUN", f"hydra.run.dir={folder}"]
    code = runs.launcher.launch(count, ["-m", "est_cli", *flags, *overrides], job.as_environment())
    if code == BAD_INPUT:
        raise UserError(f"{directory.path.name}: its processes have told what is wrong")
    if code not in (DONE, STOPPED, INTERRUPTED):
        raise RunFailed((directory.error() or "").strip() or f"its processes ended with code {code}")
    return code
