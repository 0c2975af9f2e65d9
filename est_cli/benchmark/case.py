"""What is measured: one optimizer step of every stage of a schedule, on random tokens."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from est_cli.config import Count, ModelConfig, OptimizerConfig, SamplingConfig, TrainConfig
from est_cli.subnet.flops import Flops, training_flops
from est_cli.subnet.plan import stage_subnetwork
from est_cli.subnet.schedule import StageSpec

THREE_STAGES = (StageSpec(None, 0.5, 0.5, 0.5), StageSpec(None, 0.5, 0.5), StageSpec())

_GPT2 = ("layernorm", "learned", "gelu", True, True)
_LLAMA = ("rmsnorm", "rope", "swiglu", False, False)
PRESETS = {
    "nano": ModelConfig(4, 4, 2, 128, 384, 4096, 256, *_LLAMA).with_head_dim(),
    "gpt2": ModelConfig(12, 12, 12, 768, 3072, 50304, 1024, *_GPT2).with_head_dim(),
    "gpt2_medium": ModelConfig(24, 16, 16, 1024, 4096, 50304, 1024, *_GPT2).with_head_dim(),
    "tinyllama": ModelConfig(22, 32, 4, 2048, 5632, 32000, 2048, *_LLAMA).with_head_dim(),
}
"""The architectures of conf/model, for machines that cannot read YAML; a test holds them equal."""


@dataclass(frozen=True)
class Case:
    """The defaults are those of python -m est_cli.benchmark."""

    model: ModelConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stages: tuple[StageSpec, ...] = THREE_STAGES
    """Without their ends. The last is the full model, which the others are compared with."""
    batch_size: Count = 4
    seq_len: Count = 256
    grad_accum: Count = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    kernels: Literal["auto", "torch", "triton", "masked"] = "auto"
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
        shape, generator = (self.batch_size, self.seq_len + 1), torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(self.model.vocab_size, shape, generator=generator).to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def case_of(config: TrainConfig) -> Case:
    """The stages of a training config in order; the full model is added if the last one does not train it."""
    stages = [replace(spec, end=None) for spec in config.scheduler.stages]
    if stages[-1] != StageSpec():
        stages.append(StageSpec())
    trainer, same = config.trainer, ("batch_size", "grad_accum", "precision", "device", "compile", "peak_flops")
    return Case(
        config.model,
        config.sampling,
        config.optimizer,
        tuple(stages),
        seq_len=config.data.seq_len,
        kernels=config.kernels,
        recompute=trainer.recompute == "block",
        seed=config.seed,
        **{key: getattr(trainer, key) for key in same},
    )
