"""Checkpoints: a folder for each step, written whole or not at all, and verified before it is read.

step-00001000/
  model.safetensors       the full model's weights
  optimizer.safetensors   moments and step counts (absent if only weights were saved)
  state.json              step, config, versions, the commit of the code
  checksums.json          the SHA-256 of each file beside it

If the ranks of a run share the state, each writes its part of both: model-00001-of-00004.safetensors, and so on; see
sharded_checkpoint.py. Either form loads into any number of ranks. Tensors are safetensors and the rest is JSON, so
loading runs no code.
"""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

import est_cli
from est_cli.errors import PeerLost, RunFailed, UserError
from est_cli.files import read_json, sync, write_json
from est_cli.model.transformer import Transformer
from est_cli.training.distributed import AS_LONG_AS_IT_TAKES, World
from est_cli.training.files import check_names, checksum, write_tensors

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CHECKSUMS = "checksums.json"
Tensors = Mapping[str, Tensor]
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written whole; `damage` tells whether it still is."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return int(_NAME.fullmatch(self.folder.name)[1])

    @cached_property
    def state(self) -> dict[str, Any]:
        return read_json(self.folder / STATE)

    def damage(self) -> str | None:
        """What is wrong with the files, or None."""
        checksums = read_json(self.folder / CHECKSUMS)
        if STATE not in checksums or not any(name.startswith("model") for name in checksums):
            return f"{CHECKSUMS} is missing or unreadable"
        with ThreadPoolExecutor() as pool:
            found = {name: pool.submit(checksum, self.folder / name) for name in checksums}
        for name, expected in checksums.items():
            try:
                if found[name].result() != expected:
                    return f"{name} does not match its checksum"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return None if self.state.get("step") == self.step else f"{STATE} is of another step"

    @property
    def can_resume(self) -> bool:
        return any(self.folder.glob("optimizer*.safetensors"))

    def load_model(self, model: Transformer) -> None:
        """Fill the parameters; raises ValueError if names or shapes differ."""
        self.load_weights({name: parameter.data for name, parameter in model.named_parameters()})

    def load_weights(self, weights: Tensors) -> None:
        """Fill the tensors, or the parts of DTensors held here; raises ValueError if names or shapes differ."""
        self._fill(weights, MODEL)

    def load_moments(self, moments: Tensors) -> None:
        """As `load_weights`, with the moments and step counts."""
        self._fill(moments, OPTIMIZER)

    def _fill(self, targets: Tensors, name: str) -> None:
        """Read from the file `name`, or from the parts of it."""
        if not (self.folder / name).exists() or any(hasattr(target, "to_local") for target in targets.values()):
            from est_cli.training import sharded_checkpoint

            sharded_checkpoint.fill(targets, self.folder, Path(name).stem)
            return
        with safe_open(self.folder / name, "pt") as file, torch.no_grad():
            check_names({key: file.get_slice(key).get_shape() for key in file.keys()}, targets)  # noqa: SIM118
            for key, target in targets.items():
                target.copy_(file.get_tensor(key))


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run directory."""

    folder: Path
    keep: int = 2
    keep_best: bool = False
    code: dict[str, Any] | None = None
    """Commit of the code that trains, if it is a git checkout."""
    lasting: frozenset[int] = frozenset()
    """Steps that always get a checkpoint, which is never removed."""

    def save(self, step: int, weights: Tensors, moments: Tensors | None, facts: dict[str, Any]) -> Path:
        """Write the state after `step` optimizer steps; `facts` go into state.json.

        Raises OSError if the disk does not take it; earlier checkpoints stay.
        """
        self.remove_leftovers()
        temporary = self.temporary(step)
        try:
            temporary.mkdir(parents=True)
            write_tensors(weights, temporary / MODEL)
            if moments is not None:
                write_tensors(moments, temporary / OPTIMIZER)
            names = [path.name for path in temporary.iterdir()]
            return self.complete(step, facts, {name: checksum(temporary / name) for name in names})
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # the room is needed
            raise

    def temporary(self, step: int) -> Path:
        """Where a checkpoint is written; nothing reads it."""
        return self.folder / f".writing-step-{step:08d}"

    def complete(self, step: int, facts: dict[str, Any], checksums: dict[str, str]) -> Path:
        """Add the JSON to the tensors, whose checksums are given, and give the folder its name."""
        temporary = self.temporary(step)
        versions = {"est_cli": est_cli.__version__, "torch": torch.__version__, "numpy": np.__version__}
        write_json(temporary / STATE, {"step": step, **facts, "versions": versions, "code": self.code})
        checksums = {**checksums, STATE: checksum(temporary / STATE)}
        write_json(temporary / CHECKSUMS, dict(sorted(checksums.items())))
        for name in (*checksums, CHECKSUMS):
            sync(temporary / name)
        sync(temporary)
        for other in self._all():
            if other.step >= step:
                # Replaces a later checkpoint left behind when the run resumed from an earlier one.
                self._drop(other)
        final = self._publish(temporary)
        self._prune()
        return final

    def _publish(self, temporary: Path) -> Path:
        final = temporary.rename(self.folder / temporary.name.removeprefix(".writing-"))
        sync(self.folder)
        return final

    def adopt(self, checkpoint: Checkpoint) -> None:
        """Take in another run's checkpoint whole, or not at all: as hard links, or copies if the disk has none.

        No file of a checkpoint is ever changed, so that the two runs can share them.
        """
        self.remove_leftovers()
        temporary = self.temporary(checkpoint.step)
        temporary.mkdir(parents=True)
        for path in checkpoint.folder.iterdir():
            try:
                os.link(path, temporary / path.name)
            except OSError:
                shutil.copyfile(path, temporary / path.name)
                sync(temporary / path.name)
        sync(temporary)
        self._publish(temporary)

    def newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The first of `sound`, if there is any checkpoint."""
        return next(self.sound(warn), None)

    def to_resume(self, max_steps: int, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest from which a run of `max_steps` can go on; one without moments only if it is of the last step.

        Raises UserError if there are checkpoints and none will do.
        """
        only_weights = []
        for checkpoint in self.sound(warn):
            if checkpoint.can_resume or checkpoint.step == max_steps:
                return checkpoint
            only_weights.append(f"{checkpoint.folder}: holds only weights, which cannot be trained further")
            warn(only_weights[-1])
        if only_weights:
            raise UserError("no checkpoint of this run can be continued:", *only_weights)
        return None

    def sound(self, warn: Callable[[str], None]) -> Iterator[Checkpoint]:
        """Every sound checkpoint, the highest step first; damaged ones are named and passed over.

        Raises UserError if there are checkpoints and none is sound.
        """
        damaged, checkpoints = [], self._all()
        for checkpoint in reversed(checkpoints):
            problem = checkpoint.damage()
            if problem is None:
                yield checkpoint
                continue
            damaged.append(f"{checkpoint.folder}: {problem}")
            warn(f"damaged checkpoint passed over: {damaged[-1]}")
        if damaged and len(damaged) == len(checkpoints):
            raise UserError("no checkpoint of this run is sound:", *damaged)

    def _all(self) -> list[Checkpoint]:
        """In the order of their steps."""
        found = [Checkpoint(path) for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def _prune(self) -> None:
        checkpoints = self._all()
        best = _best(checkpoints) if self.keep_best else None
        for checkpoint in checkpoints[: -self.keep]:
            if checkpoint != best and checkpoint.step not in self.lasting:
                self._drop(checkpoint)

    def _drop(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint. It loses its name first: a process that dies here leaves no half of one."""
        dropped = checkpoint.folder.rename(self.folder / f".dropped-{checkpoint.folder.name}")
        shutil.rmtree(dropped, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove what a process that died while it wrote or removed a checkpoint left behind."""
        for kind in (".writing-*", ".dropped-*"):
            for leftover in self.folder.glob(kind):
                shutil.rmtree(leftover, ignore_errors=True)


class Saving:
    """Writes the checkpoints of a run, and says how that went.

    If the ranks share the state, a thread writes it while training goes on; training waits for it before the next
    checkpoint, and at the end of this context. Otherwise rank 0 writes, and all ranks wait for it.
    """

    def __init__(self, checkpoints: Checkpoints, world: World, say: Callable[[str], None], step: int | None):
        self.checkpoints, self.world, self.say = checkpoints, world, say
        self.step = step
        """The step of the newest checkpoint."""
        self._writing: tuple[int, Future[Path | None]] | None = None
        self._told_of_unwritten = False

    def save(self, step: int, weights: Tensors, moments: Tensors | None, facts: dict[str, Any], is_last: bool) -> None:
        """Write a checkpoint unless there is one of this step; the last one is written on return. A collective.

        A failed write is told and training goes on; if `is_last`, it raises RunFailed.
        """
        self.poll(waits=True)
        if self.step == step:
            return
        if self.world.shards > 1:
            from est_cli.training import sharded_checkpoint  # more than a second, which one process never needs

            written = sharded_checkpoint.begin(self.checkpoints, step, weights, moments, facts, self._group)
            self._writing = step, written
            self.poll(waits=is_last, is_last=is_last)
        else:
            self._finish(step, lambda: self._write_by_main(step, weights, moments, facts), is_last)

    def poll(self, waits: bool = False, is_last: bool = False) -> None:
        """Say how the checkpoint that is being written ended, if it has; `waits` for that."""
        if self._writing is not None and (waits or self._writing[1].done()):
            (step, written), self._writing = self._writing, None
            self._finish(step, written.result, is_last)

    def _finish(self, step: int, write: Callable[[], Path | None], is_last: bool) -> None:
        try:
            path = write()
        except OSError as error:
            before = "there is none before it" if self.step is None else f"step {self.step}'s stays"
            message = f"the checkpoint of step {step} could not be written ({error.strerror or error}); {before}"
            if is_last:
                raise RunFailed(message) from error
            if not self._told_of_unwritten:
                self.say(f"{message}; training goes on")
            self._told_of_unwritten = True
        else:
            self.step = step
            self.say(f"checkpoint written: {path}")

    def _write_by_main(
        self, step: int, weights: Tensors, moments: Tensors | None, facts: dict[str, Any]
    ) -> Path | None:
        weights, moments = self.world.gathered(weights), moments and self.world.gathered(moments)
        path, raised = None, None
        # Rank 0 may write for longer than a collective may take.
        with self.world.wait_for_main(f"checkpoint {step}"):
            try:
                path = self.checkpoints.save(step, weights, moments, facts) if self.world.is_main else None
            except OSError as error:
                raised = error
        if self.world.any(raised is not None):
            raise raised or OSError("rank 0 could not write it")
        return path

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        """Used only by the writing thread: collectives of two threads in one group could get mixed up."""
        return dist.new_group(backend="gloo", timeout=AS_LONG_AS_IT_TAKES)  # for a slow disk

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Wait for the last write unless a rank is lost, and its part of the write with it."""
        if error is None:
            self.poll(waits=True)
        elif isinstance(error, RunFailed | UserError) and not isinstance(error, PeerLost):
            with contextlib.suppress(RuntimeError):
                self.poll(waits=True)


def _best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint of the lowest validation loss among those of evaluated steps."""

    def is_evaluated(checkpoint: Checkpoint) -> bool:
        loss = checkpoint.state.get("val_loss")
        return loss is not None and math.isfinite(loss) and checkpoint.state.get("val_step") == checkpoint.step

    return min(filter(is_evaluated, checkpoints), key=lambda checkpoint: checkpoint.state["val_loss"], default=None)
