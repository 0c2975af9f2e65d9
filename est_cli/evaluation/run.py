"""A run directory opened for reading: its config, its data and the model of its newest checkpoint."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from est_cli.config import DataConfig, TrainConfig, read_train_config
from est_cli.data.run_data import RunData, Text
from est_cli.data.tokenizers import Tokenizer
from est_cli.data.tokens import TokenStore, prepare, stored
from est_cli.errors import UserError, nearest
from est_cli.evaluation.standalone import Sampled, packed
from est_cli.model.transformer import Transformer
from est_cli.subnet.growth import model_after
from est_cli.subnet.plan import Subnetwork, whole_plan
from est_cli.training.checkpoint import Checkpoint, Checkpoints


@dataclass(frozen=True)
class OpenRun:
    folder: Path
    config: TrainConfig
    checkpoint: Checkpoint
    model: Transformer
    """On its device: the full model, or the part of it that has joined by the checkpoint."""


def read_run_config(folder: Path) -> TrainConfig:
    """The config of a run directory. Raises UserError where `folder` is none."""
    path = folder / "config.yaml"
    if not path.exists():
        parent = folder.parent
        siblings = [str(p.parent) for p in parent.glob("*/config.yaml")] if parent.is_dir() else []
        raise UserError(f"run={folder}: must be a run directory (with config.yaml){nearest(str(folder), siblings)}")
    try:
        plain = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"run={folder}: its config.yaml cannot be read: {error}") from error
    if not isinstance(plain, dict):
        raise UserError(f"run={folder}: its config.yaml is not that of a run of est-train")
    return read_train_config(plain)


def open_run(folder: Path, warn: Callable[[str], None]) -> OpenRun:
    """Load the newest sound checkpoint. Raises UserError where there is none."""
    config = read_run_config(folder)
    checkpoint = Checkpoints(folder / "checkpoints").newest(warn)
    if checkpoint is None:
        raise UserError(
            f"run={folder}: this run has no checkpoint; trainer.save_final=weights or full writes one "
            f"(this run had {config.trainer.save_final})"
        )
    return OpenRun(folder, config, checkpoint, load_model(config, checkpoint))


def load_model(config: TrainConfig, checkpoint: Checkpoint) -> Transformer:
    """The model of a checkpoint on its device; of a run that grows, what has joined by then."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.device == "cuda" else "cpu")
    model = Transformer(config.model)
    checkpoint.load_model(model)
    grown = model_after(config, checkpoint.step)
    return packed(model.to(device), Sampled(Subnetwork(grown), whole_plan(grown)))


def run_tokenizer(run: OpenRun, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that the run was trained with: its own copy, else that of its token files."""
    kept = _data_of(run)
    return kept.tokenizer or _prepared(run.config, run.config.data, kept, say).tokenizer


def run_store(run: OpenRun, say: Callable[[str], None], data: DataConfig | None = None) -> TokenStore:
    """The token files that the run trained on, else what its config names by now, or those of other `data`.

    They are made with the run's own tokenizer.
    """
    kept = _data_of(run)
    if data is not None:
        return _prepared(run.config, data, kept, say)
    return stored(run.config.data, kept) or _prepared(run.config, run.config.data, kept, say)


def _data_of(run: OpenRun) -> RunData:
    return RunData(run.folder, run.config.tokenizer.kind)


def _prepared(config: TrainConfig, data: DataConfig, kept: RunData, say: Callable[[str], None]) -> TokenStore:
    def tell(text: Text) -> None:
        if data is config.data:
            kept.tell(text, say)

    return prepare(data, config.tokenizer, config.model.vocab_size, say, sys.stderr.isatty(), kept, tell)
