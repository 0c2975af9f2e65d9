"""One job of a sweep: a run in the folder that Hydra made, in this process or in ranks of its own."""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from est_cli import data, runs, training
from est_cli.composition.composer import plain
from est_cli.composition.typed_text import quoted
from est_cli.config import TrainConfig
from est_cli.errors import BAD_INPUT, DONE, INTERRUPTED, STOPPED, RunFailed, UserError, say
from est_cli.experiments.arms import read_config
from est_cli.runs.cooldown import take_trunk
from est_cli.runs.directory import RunDirectory
from est_cli.runs.stopping import stop_request

AS_JOB = "EST_JOB"
"""Environment variable of the ranks of a sweep's job: its label, and what continues the sweep, as JSON."""


@dataclass(frozen=True)
class Call:
    """How the sweep was called. A launcher sends it with every job to the process that runs the job."""

    arguments: tuple[str, ...]
    """sys.argv"""
    flags: tuple[str, ...]
    """The flags among them that decide what is composed."""
    command: str
    """What continues the sweep."""
    process: int

    @property
    def is_elsewhere(self) -> bool:
        """Whether this process runs a job for the sweep's own process."""
        return os.getpid() != self.process


def run_job(composed: DictConfig, directory: RunDirectory, call: Call) -> float:
    """Train the composed config in the directory and return the validation loss. A finished job is not run again.

    Raises SystemExit when asked to stop.
    """
    if call.is_elsewhere:
        sys.argv[:] = call.arguments
        if stop_request()():
            raise SystemExit(STOPPED)
    node = HydraConfig.get()
    composed = plain(composed)
    trunk = take_trunk(composed)
    config, notes = read_config(composed, node)
    if (started := training.distributed.launched_ranks()) > 1:
        raise UserError(f"-m: {started} processes were started; a sweep starts those of its jobs itself")
    group = config.logger.group or Path(node.sweep.dir).name
    config = replace(config, logger=replace(config.logger, group=group))
    if directory.is_done(config):
        _check_text(directory, config)
        say(f"{directory.path.name}: done already, skipped")
        return directory.summary()["val_loss"]
    say(f"{directory.path.name}: job {node.job.num + 1}")
    if config.trainer.devices > 1:
        return _run_in_ranks(node, config.trainer.devices, group, directory, call)
    label = directory.path.name if call.is_elsewhere else None
    alone, overrides = training.distributed.Peers(), list(node.overrides.task)
    prepared = runs.preparation.prepare_run(config, notes, directory, overrides, sys.argv[1:], alone, trunk, label)
    code = runs.execution.execute(replace(prepared, command=call.command, job=True), alone)
    if code != DONE:
        raise SystemExit(code)
    return directory.summary()["val_loss"]


def _check_text(directory: RunDirectory, config: TrainConfig) -> None:
    """Raises UserError if a finished job trained on another text than the jobs after it would."""
    done = data.run_data.RunData(directory.path, config.tokenizer.kind)
    if done.text is not None and config.data.on_change == "refuse":
        done.check(data.tokens.current_text(config.data), config.data, say)


def _run_in_ranks(node: DictConfig, count: int, group: str, directory: RunDirectory, call: Call) -> float:
    """A job on several devices: a run of its own, in the job's folder."""
    folder, group = (quoted(text) for text in (str(directory.path), group))
    paths = [override for override in node.overrides.hydra if override.startswith("hydra.searchpath=")]
    overrides = [*paths, *node.overrides.task, f"++logger.group={group}", "hydra.mode=RUN", f"hydra.run.dir={folder}"]
    job = json.dumps({"label": directory.path.name, "command": call.command})
    code = runs.launcher.launch(count, ["-m", "est_cli", *call.flags, *overrides], {AS_JOB: job})
    if code in (STOPPED, INTERRUPTED):
        raise SystemExit(code)
    if code == BAD_INPUT:
        raise UserError(f"{directory.path.name}: its processes have told what is wrong")
    if code != DONE:
        raise RunFailed(directory.error() or f"its processes ended with code {code}")
    return directory.summary()["val_loss"]
