"""A run directory opened for reading: its config, its data and the model of its newest checkpoint."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from est_cli.config import DataConfig, TrainConfig, read_train_config
from est_cli.data.sentencepiece_bpe import SentencePieceTokenizer
from est_cli.data.tokenizers import Tokenizer, load_tokenizer
from est_cli.data.tokens import TokenStore, prepare
from est_cli.errors import UserError, nearest
from est_cli.evaluation.standalone import Sampled, packed
from est_cli.model.transformer import Transformer
from est_cli.subnet.growth import model_after
from est_cli.subnet.plan import Subnetwork, whole_plan
from est_cli.training.checkpoint import Checkpoint, Checkpoints

TOKENIZER = "tokenizer"
"""The folder of a run directory that holds the tokenizer's files, so that a run can be read without its corpus."""


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
    """The tokenizer that the run was trained with."""
    return load_tokenizer(run.config.tokenizer.kind, _tokenizer_folder(run, say))


def run_store(run: OpenRun, say: Callable[[str], None], data: DataConfig | None = None) -> TokenStore:
    """The token files that the run trained on, or those of other `data` under the run's own tokenizer."""
    if data is None:
        return _prepared(run.config, say)
    tokenizer = run.config.tokenizer
    if tokenizer.kind != "byte":
        folder = _tokenizer_folder(run, say)
        path = folder / SentencePieceTokenizer.FILE if tokenizer.kind == "sentencepiece" else folder
        tokenizer = replace(tokenizer, path=str(path), vocab_size="auto")
    return _prepared(replace(run.config, data=data, tokenizer=tokenizer), say)


def _tokenizer_folder(run: OpenRun, say: Callable[[str], None]) -> Path:
    """The run's own copy, else that of its token files."""
    folder = run.folder / TOKENIZER
    return folder if folder.is_dir() else _prepared(run.config, say).folder


def _prepared(config: TrainConfig, say: Callable[[str], None]) -> TokenStore:
    return prepare(config.data, config.tokenizer, config.model.vocab_size, say, sys.stderr.isatty())
