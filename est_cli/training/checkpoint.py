"""Checkpoints: a folder a step, written whole or not at all, and checked before it is believed.

step-00001000/
  model.safetensors       the full model's weights, in parameter order
  optimizer.safetensors   moments and step counts (absent where only weights were saved)
  state.json              step, config, versions
  checksums.json          the SHA-256 of each file beside it

Tensors only in the safetensors, JSON for the rest: loading runs no code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import est_cli
from est_cli.errors import UserError
from est_cli.model.transformer import Transformer
from est_cli.training.optimizer import SampledAdamW

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CHECKSUMS = "checksums.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files agree with their checksums."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.state["step"]

    @property
    def can_resume(self) -> bool:
        return (self.folder / OPTIMIZER).exists()

    def load_model(self, model: Transformer) -> None:
        """Fill the model's parameters; raises ValueError where names or shapes differ."""
        _fill(dict(model.named_parameters()), load_file(self.folder / MODEL))

    def load_optimizer(self, optimizer: SampledAdamW) -> None:
        """Fill the moments and step counts."""
        _fill(optimizer.state(), load_file(self.folder / OPTIMIZER))


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run directory."""

    folder: Path
    keep: int = 2
    keep_best: bool = False

    def save(self, step: int, model: Transformer, optimizer: SampledAdamW | None, facts: dict[str, Any]) -> Path:
        """Write the state after `step` optimizer steps; `facts` go into state.json."""
        final = self.folder / f"step-{step:08d}"
        for leftover in self.folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = self.folder / f".writing-step-{step:08d}"
        temporary.mkdir(parents=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}, temporary / MODEL)
        if optimizer is not None:
            save_file({name: t.cpu().contiguous() for name, t in optimizer.state().items()}, temporary / OPTIMIZER)
        versions = {"est_cli": est_cli.__version__, "torch": torch.__version__, "numpy": np.__version__}
        _write_json(temporary / STATE, {"step": step, **facts, "versions": versions})
        _write_json(temporary / CHECKSUMS, {path.name: _checksum(path) for path in sorted(temporary.iterdir())})
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        for folder in self._folders():
            if _step_of(folder) >= step:
                # Of a run that went on from an earlier, sound checkpoint: this one takes its place.
                shutil.rmtree(folder)
        temporary.rename(final)
        _sync(self.folder)
        self._prune()
        return final

    def newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The sound checkpoint of the highest step; damaged ones are named and passed over.

        Raises UserError where there are checkpoints and none is sound.
        """
        damaged = []
        for folder in reversed(self._folders()):
            problem = _damage(folder)
            if problem is None:
                return Checkpoint(folder, json.loads((folder / STATE).read_text()))
            damaged.append(f"{folder}: {problem}")
            warn(f"damaged checkpoint passed over: {damaged[-1]}")
        if damaged:
            raise UserError("no checkpoint of this run is sound:", *damaged)
        return None

    def _folders(self) -> list[Path]:
        """Checkpoint folders in the order of their steps."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)

    def _prune(self) -> None:
        folders = self._folders()
        best = _best(folders) if self.keep_best else None
        for folder in folders[: -self.keep]:
            if folder != best:
                shutil.rmtree(folder, ignore_errors=True)


def _best(folders: list[Path]) -> Path | None:
    losses = [(loss, folder) for folder in folders if (loss := _state(folder).get("val_loss")) is not None]
    return min(losses)[1] if losses else None


def _step_of(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])


def _state(folder: Path) -> dict[str, Any]:
    return _read_json(folder / STATE)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    checksums = _read_json(folder / CHECKSUMS)
    if not {MODEL, STATE} <= checksums.keys():
        return f"{CHECKSUMS} is missing or unreadable"
    for name, expected in checksums.items():
        try:
            if _checksum(folder / name) != expected:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name}: {error.strerror}"
    if _state(folder).get("step") != _step_of(folder):
        return f"{STATE} is of another step"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


@torch.no_grad()
def _fill(targets: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    if targets.keys() != tensors.keys():
        raise ValueError(f"checkpoint and model differ in {sorted(targets.keys() ^ tensors.keys())[:5]}")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(target.shape)}")
        target.copy_(tensors[name])


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
