"""Tiny configs and corpora: whatever a test does not name stays at a small value that works."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from est_cli.config import (
    CheckpointConfig,
    DataConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TrainerConfig,
)
from est_cli.model.transformer import Transformer
from est_cli.subnet.schedule import StageSpec

GPT2 = ModelConfig(
    n_layers=3, n_heads=4, n_kv_heads=4, head_dim=3, d_model=12, d_ff=16, vocab_size=29, max_seq_len=16,
    norm="layernorm", position="learned", mlp="gelu", bias=True, tie_embeddings=True,
)  # fmt: skip
LLAMA = replace(
    GPT2, n_heads=6, n_kv_heads=3, head_dim=2, norm="rmsnorm", position="rope", mlp="swiglu", bias=False,
    tie_embeddings=False, init="tinyllama",
)  # fmt: skip
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}

THREE_STAGES = (StageSpec(2 / 15, 0.5, 0.5, 0.5), StageSpec(7 / 15, 0.5, 0.5), StageSpec())
FULL = (StageSpec(),)


def train_config(
    model: ModelConfig = LLAMA,
    sampling: SamplingConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    stages: tuple[StageSpec, ...] = THREE_STAGES,
    seq_len: int = 8,
    seed: int = 0,
    kernels: str = "torch",
    **trainer: Any,
) -> TrainConfig:
    """A config with a number in the place of every `auto`; `trainer` takes the keys of TrainerConfig."""
    numbers = {
        "max_steps": 15, "batch_size": 2, "grad_accum": 1, "precision": "fp32", "device": "cpu", "devices": 1,
        "compile": False, "eval_every": 0, "eval_tokens": 16, "checkpoint_every": 0, "save_final": "none",
    }  # fmt: skip
    return TrainConfig(
        model=model,
        data=DataConfig(kind="stdlib", seq_len=seq_len),
        tokenizer=TokenizerConfig(kind="byte"),
        scheduler=SchedulerConfig(stages),
        sampling=sampling or SamplingConfig(),
        optimizer=optimizer or OptimizerConfig(),
        trainer=TrainerConfig(**{**numbers, **trainer}),
        logger=LoggerConfig(kind="none"),
        checkpoint=CheckpointConfig(),
        seed=seed,
        kernels=kernels,
    )


def random_master(model: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """Every parameter away from 0 and 1, biases and norms too, so that dropping one shows."""
    generator = torch.Generator().manual_seed(seed)
    master = Transformer(model, dtype=dtype)
    for name, parameter in master.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.4 * values + ("norm" in name and name.endswith("weight")))
    return master


def random_batch(model: ModelConfig, batch: int = 2, length: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size, (batch, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def snapshot(model: Transformer) -> dict[str, Tensor]:
    """A copy of every parameter, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class RandomTokens:
    """A corpus of noise, with the two splits that the loop reads."""

    def __init__(self, vocab_size: int, n_tokens: int = 2000, seed: int = 0):
        tokens = np.random.default_rng(seed).integers(vocab_size, size=n_tokens, dtype=np.uint16)
        self.train, self.val = tokens[: n_tokens // 2], tokens[n_tokens // 2 :]


class Recorder:
    """An observer that keeps records and messages."""

    def __init__(self) -> None:
        self.records: list[dict[str, float | int | None]] = []
        self.messages: list[str] = []

    def log(self, record: dict[str, float | int | None]) -> None:
        self.records.append(record)

    def say(self, message: str) -> None:
        self.messages.append(message)
