"""est-train --cooldown CHECKPOINT: a new run that takes over a trunk's steps and then lets the learning rate fall.

The trunk is a run at a constant rate. The new run has the config of a straight run with optimizer.decay=wsd whose decay
begins at the checkpoint, so its first steps are the trunk's to the bit. Its folder starts with the trunk's checkpoint
and metrics; from there on it is an ordinary run. One trunk can serve many budgets.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from est_cli import training
from est_cli.composition.composer import dotted_keys
from est_cli.composition.typed_text import typed_keys
from est_cli.config import OptimizerConfig, TrainConfig, as_plain, read_train_config
from est_cli.errors import UserError, nearest
from est_cli.files import replacing
from est_cli.runs.changes import BATCH, HARMLESS, MAX_STEPS, changes, is_below
from est_cli.runs.directory import RunDirectory
from est_cli.runs.rerun import store_config, without_call
from est_cli.schema import read
from est_cli.subnet.schedule import boundary_step
from est_cli.tracking.metrics import METRICS_NAME, truncate

KEY = "--cooldown"
"""The flag, and the composed config's key for the checkpoint: no override can be written with this name."""

_LENGTH = ("optimizer.decay_steps", "optimizer.decay_fraction")
_FREE = (*_LENGTH, "optimizer.decay_shape", "optimizer.min_lr_ratio", "trainer.device", *HARMLESS, *BATCH, "hydra")
"""Keys, and whole sections, that a cooldown may change; the product of BATCH must stay."""
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Trunk:
    """A checkpoint of a run whose learning rate had not begun to fall."""

    folder: Path
    step: int
    """Optimizer steps that the checkpoint has taken."""
    config: TrainConfig

    @classmethod
    def at(cls, path: str) -> "Trunk":
        """The trunk that ends with the checkpoint in `path`. `verify` compares its checksums.

        Raises UserError if there is no checkpoint, or one that no cooldown can begin with.
        """
        typed = Path(path).expanduser()
        folder = Path(os.path.abspath(typed.parent if typed.is_file() else typed))
        if not _STEP.fullmatch(folder.name) or not folder.is_dir():
            raise UserError(f"{KEY}={path}: must be a checkpoint, a folder RUN/checkpoints/step-…{_nearest(typed)}")
        checkpoint = training.checkpoint.Checkpoint(folder)
        plain, step = checkpoint.state.get("config"), checkpoint.state.get("step")
        known = isinstance(plain, dict) and isinstance(step, int)
        if not known or not checkpoint.can_resume:
            if problem := checkpoint.damage() or ("" if known else "it names no config"):
                raise UserError(f"{KEY}={path}: this checkpoint is damaged: {problem}")
            raise UserError(
                f"{KEY}={path}: holds weights and no optimizer moments, and cannot be trained further; must be a "
                "full checkpoint, as trainer.checkpoint_every and trainer.save_final=full write them"
            )
        try:
            config = read_train_config(plain)
        except UserError as error:
            raise UserError(f"{KEY}={path}: its config is of another version:", *error.problems) from error
        start = config.optimizer.decay_start(config.trainer.max_steps)
        if step > start:
            raise UserError(
                f"{KEY}={path}: the trunk's learning rate began to fall at step {start} "
                f"(optimizer.decay={config.optimizer.decay}); must be a checkpoint of step {start} or before, or of a "
                "run with optimizer.decay=none"
            )
        return cls(folder, step, config)

    @property
    def run_dir(self) -> Path:
        return self.folder.parent.parent

    @property
    def decay_start(self) -> int:
        """Where the decay begins: at the checkpoint, or at the end of the warmup if the checkpoint lies in it."""
        return max(self.step, boundary_step(self.config.optimizer.warmup, self.config.trainer.max_steps))

    def cooled(self, decay_steps: int) -> TrainConfig:
        """The config of a straight run that begins as the trunk did, and decays over its last `decay_steps` steps.

        Fractions of the trunk's length become numbers of steps. Stages that begin at the checkpoint or later are left
        out; the last one that stays lasts to the end.
        """
        config, steps = self.config, self.config.trainer.max_steps
        specs = zip(config.scheduler.stages, config.stages, strict=True)
        begun = [replace(spec, end=stage.end) for spec, stage in specs if stage.first_step < self.step]
        begun[-1] = replace(begun[-1], end=None)
        warmup = boundary_step(config.optimizer.warmup, steps)
        return replace(
            config,
            # The options made the trunk's stages, and have no effect on these.
            scheduler=replace(config.scheduler, stages=tuple(begun), options={}),
            optimizer=replace(config.optimizer, warmup=warmup, decay="wsd", decay_steps=decay_steps),
            trainer=replace(config.trainer, max_steps=self.decay_start + decay_steps),
        )

    def length(self, decay_steps: int | float | None, decay_fraction: float) -> int:
        """Steps of the decay. A fraction is the share of the whole new run; raises UserError if it is 1."""
        if isinstance(decay_steps, int):
            return decay_steps
        key, share = (_LENGTH[1], decay_fraction) if decay_steps is None else (_LENGTH[0], decay_steps)
        if share == 1:
            raise UserError(
                f"{key}={share}: must be below 1 in a cooldown: it is the share of the whole run, of which "
                f"{self.decay_start} steps come before it; an integer counts steps"
            )
        return max(1, round(self.decay_start * share / (1 - share)))

    def check(self, config: TrainConfig) -> None:
        """Raises UserError if the rest of `config` is not the trunk's."""
        differing = changes(as_plain(self.cooled(config.optimizer.decay_steps)), as_plain(config))
        wrong = [c for c in differing if c.problem and (c.key in BATCH or not is_below(c.key, _FREE))]
        if wrong:
            raise UserError(
                f"{KEY}={self.folder}: the trunk has another config:", *(f"{c} ({c.problem})" for c in wrong)
            )

    def verify(self) -> None:
        """Raises UserError if the checkpoint is damaged, or the trunk's metrics are not beside it."""
        if problem := training.checkpoint.Checkpoint(self.folder).damage():
            raise UserError(f"{KEY}={self.folder}: this checkpoint is damaged: {problem}")
        if not (self.run_dir / METRICS_NAME).is_file():
            raise UserError(
                f"{KEY}={self.folder}: must lie in its run directory, whose {METRICS_NAME} the cooldown begins with; "
                f"there is none in {self.run_dir}"
            )

    def begin(self, directory: RunDirectory, config: TrainConfig) -> None:
        """Copy the trunk's checkpoint and metrics into `directory`, as if a run of `config` had stopped there.

        If the process dies here, the next one does it again. Raises OSError.
        """
        directory.write_config(config)
        with replacing(directory.path / METRICS_NAME) as partial:
            shutil.copyfile(self.run_dir / METRICS_NAME, partial)
            truncate(partial, self.step)
        checkpoint = training.checkpoint.Checkpoint(self.folder)
        training.checkpoint.Checkpoints(directory.checkpoints).adopt(checkpoint)

    def note(self, config: TrainConfig) -> str:
        """One line for people: what the run consists of."""
        said = (
            f"cooldown of {self.folder}: {self.step} steps are the trunk's; the learning rate falls from step "
            f"{self.decay_start} to step {config.trainer.max_steps}"
        )
        left_out = len(self.config.stages) - len(config.stages)
        return said + (f"; stages of the trunk that begin later are left out ({left_out})" if left_out else "")


def cooldown_config(path: str, overrides: list[str]) -> str:
    """Make the primary config of a cooldown for this process, and return its name. `take_trunk` sets its length.

    Raises UserError if `path` is no trunk, and for overrides of what the trunk has decided.
    """
    trunk = Trunk.at(path)
    _check_overrides(trunk, overrides)
    config = without_call(as_plain(trunk.cooled(1)))
    config["optimizer"]["decay_steps"], config["trainer"]["max_steps"] = None, "auto"
    config[KEY] = str(trunk.folder)
    name = f"cooldown-{hashlib.sha256(json.dumps(config, default=str).encode()).hexdigest()[:8]}"
    return store_config(name, config)


def take_trunk(composed: dict[str, Any]) -> Trunk | None:
    """Take the trunk out of a composed config, and write the cooldown's lengths into it; None if there is no trunk."""
    path = composed.pop(KEY, None)
    if path is None:
        return None
    trunk = Trunk.at(path)
    problems: list[str] = []
    optimizer = read(OptimizerConfig, composed["optimizer"], "optimizer", problems)
    if problems:
        raise UserError(*problems)
    decay_steps = trunk.length(optimizer.decay_steps, optimizer.decay_fraction)
    composed["optimizer"]["decay_steps"] = decay_steps
    composed["trainer"]["max_steps"] = trunk.decay_start + decay_steps
    return trunk


def _check_overrides(trunk: Trunk, overrides: list[str]) -> None:
    """Raises UserError for keys that the trunk has decided, and for unknown keys."""
    problems, decided = [], []
    known = set(dotted_keys(as_plain(trunk.config)))
    for key in typed_keys(overrides):
        if key == MAX_STEPS:
            problems.append(f"{key}: follows from the checkpoint and the length of the decay; give {_LENGTH[0]}")
        elif is_below(key, _FREE):
            continue
        elif "." in key and key not in known:
            problems.append(f"{key}: there is no such key{nearest(key, known)}")
        else:
            decided.append(f"{key}: the trunk has decided this")
    if decided:
        decided.append(f"{KEY}={trunk.folder}: may change only {', '.join(_FREE)}")
    if problems or decided:
        raise UserError(*problems, *decided)


def _nearest(path: Path) -> str:
    """`; did you mean '...'?` for the checkpoint, or else the folder, that `path` may have been meant to name."""
    meant = _STEP.fullmatch(path.name)
    for folder in (path / "checkpoints", path, path.parent, path.parent / "checkpoints"):
        found = (_STEP.fullmatch(child.name) for child in folder.glob("step-*"))
        steps = {int(name[1]): folder / name[0] for name in found if name}
        if steps:
            step = min(steps, key=lambda step: abs(step - int(meant[1]))) if meant else max(steps)
            return f"; did you mean '{steps[step]}'?"
    above = next((parent for parent in path.parents if parent.is_dir()), None)
    if above is None:
        return ""
    hint = nearest(path.relative_to(above).parts[0], (child.name for child in above.iterdir() if child.is_dir()))
    return re.sub(r"'(.*)'", lambda match: f"'{above / match[1]}'", hint)
