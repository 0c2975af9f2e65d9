"""Run directories as est-train leaves them, without training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import FAMILIES, random_master, train_config

from est_cli.config import DataConfig, ModelConfig, TokenizerConfig, as_plain
from est_cli.model.transformer import Transformer
from est_cli.training.checkpoint import Checkpoints

VOCABULARY = 260
"""Bytes and the end of text, padded."""


def byte_model(family: str, **changes) -> ModelConfig:
    return replace(FAMILIES[family], vocab_size=VOCABULARY, **changes)


def model_of(model: ModelConfig, seed: int = 0) -> Transformer:
    """Weights of trained size, so that logits are of a few units, and none is 0 or 1."""
    master = random_master(model, torch.float32, seed)
    for name, parameter in master.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(0.5)
    return master


def write_run(folder: Path, model: Transformer, **settings: Any) -> Path:
    """A finished run of 15 steps on bytes; returns its folder. `settings` are those of train_config."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for number in range(4):
        (corpus / f"{number}.txt").write_text("some words to read\n" * 40 + str(number))
    config = replace(
        train_config(model.config, **{"eval_tokens": 32, **settings}),
        data=DataConfig(kind="text", seq_len=8, path=str(corpus), val_fraction=0.25, cache_dir=str(folder / "cache")),
        tokenizer=TokenizerConfig(kind="byte"),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(as_plain(config)))
    Checkpoints(folder / "checkpoints").save(15, dict(model.named_parameters()), None, {"val_loss": 5.0})
    return folder
