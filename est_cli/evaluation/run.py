"""A run directory opened for reading: its config, its data and the full model of its newest checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from est_cli.config import TrainConfig, read_train_config
from est_cli.errors import UserError, nearest
from est_cli.model.transformer import Transformer
from est_cli.training.checkpoint import Checkpoint, Checkpoints


@dataclass(frozen=True)
class OpenRun:
    folder: Path
    config: TrainConfig
    checkpoint: Checkpoint
    model: Transformer
    """The full model on its device."""


def read_run_config(folder: Path) -> TrainConfig:
    """The config of a run directory. Raises UserError where `folder` is none."""
    path = folder / "config.yaml"
    if not path.exists():
        parent = folder.parent
        siblings = [str(p.parent) for p in parent.glob("*/config.yaml")] if parent.is_dir() else []
        raise UserError(f"run={folder}: must be a run directory (with config.yaml){nearest(str(folder), siblings)}")
    return read_train_config(yaml.safe_load(path.read_text()))


def open_run(folder: Path, warn: Callable[[str], None]) -> OpenRun:
    """Load the newest sound checkpoint. Raises UserError where there is none."""
    config = read_run_config(folder)
    checkpoint = Checkpoints(folder / "checkpoints").newest(warn)
    if checkpoint is None:
        raise UserError(
            f"run={folder}: this run has no checkpoint; trainer.save_final=weights or full writes one "
            f"(this run had {config.trainer.save_final})"
        )
    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.device == "cuda" else "cpu")
    model = Transformer(config.model)
    checkpoint.load_model(model)
    return OpenRun(folder, config, checkpoint, model.to(device))
