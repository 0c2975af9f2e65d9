"""What is measured: one optimizer step of every stage of a schedule, on random tokens."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from est_cli.config import ModelConfig, OptimizerConfig, SamplingConfig, TrainConfig
from est_cli.subnet.flops import Flops, training_flops
from est_cli.subnet.plan import stage_subnetwork
from est_cli.subnet.schedule import StageSpec

Clock = dict[str, float]
"""Seconds of each phase of a step."""

PHASES = ("sample", "pack", "forward", "backward", "update")


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    sampling: SamplingConfig
    optimizer: OptimizerConfig
    stages: tuple[StageSpec, ...]
    """Without their ends; the last one is the full model, which the others are compared with."""
    batch_size: int
    seq_len: int
    grad_accum: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    kernels: str = "auto"
    recompute: bool = False
    compile: bool = False
    peak_flops: float | None = None
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.seq_len * self.grad_accum

    @property
    def flops(self) -> tuple[Flops, ...]:
        """Cost of one optimizer step of each stage."""
        models = [stage_subnetwork(self.model, self.sampling, stage).model for stage in self.stages]
        return tuple(training_flops(model, self.seq_len, self.tokens) for model in models)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random inputs and targets [B, T] of one micro-batch."""
        windows = np.random.Generator(np.random.Philox(self.seed)).integers(
            self.model.vocab_size, size=(self.batch_size, self.seq_len + 1)
        )
        tokens = torch.from_numpy(windows).to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def case_of(config: TrainConfig) -> Case:
    """The stages of a training config, in order; the full model is added where the last one does not train it."""
    stages = [replace(spec, end=None) for spec in config.scheduler.stages]
    if stages[-1] != StageSpec():
        stages.append(StageSpec())
    trainer = config.trainer
    return Case(
        config.model,
        config.sampling,
        config.optimizer,
        tuple(stages),
        trainer.batch_size,
        config.data.seq_len,
        trainer.grad_accum,
        trainer.precision,
        trainer.device,
        config.kernels,
        trainer.recompute == "block",
        trainer.compile,
        trainer.peak_flops,
        config.seed,
    )
