"""What the loop tells of a step: the keys of a line of metrics.jsonl."""

from typing import Protocol

import torch

from est_cli.config import ModelConfig, TrainConfig
from est_cli.subnet.flops import config_ledger
from est_cli.subnet.plan import stage_models
from est_cli.training.device import peak_flops
from est_cli.training.watch import Launched

Record = dict[str, float | int | None]


class Observer(Protocol):
    """What the loop tells of itself, on rank 0."""

    def log(self, record: Record) -> None: ...

    def say(self, message: str) -> None: ...


class Records:
    """The records of a run."""

    def __init__(self, config: TrainConfig, device: torch.device, n_ranks: int):
        self.config, self.ledger = config, config_ledger(config)
        peak = peak_flops(device, config.trainer.precision, config.trainer.peak_flops)
        self.peak = peak and peak * n_ranks
        self.has_parts = any(part != config.model for part in stage_models(config))
        self.asked = (0, 0.0)
        """Steps, and their seconds in all, when `step_s` was asked for last."""

    def step_s(self, last: Launched, train_s: float) -> float:
        """Seconds of a step: the mean since they were asked for last. `train_s`: of all until `last`."""
        n_steps, seconds = last.number + 1 - self.asked[0], train_s - self.asked[1]
        self.asked = (last.number + 1, train_s)
        return seconds / n_steps

    def of(self, step: Launched, step_s: float, grown: ModelConfig, val_loss: float | None) -> Record:
        config, plan = self.config, step.plan
        return {
            "step": step.number,
            "tokens": (step.number + 1) * config.tokens_per_step,
            "stage": step.stage.number,
            "train/loss": step.loss,
            "train/lr": step.lr,
            "train/grad_norm": step.grad_norm,
            "val/loss": val_loss,
            "subnet/heads": plan.heads.shape[1] / config.model.n_heads,
            "subnet/mlp": plan.neurons.shape[1] / config.model.d_ff,
            "subnet/layers": len(plan.layers) / config.model.n_layers,
            **self._grown(grown),
            **self.ledger.record(step.number),
            **self._speed(self.ledger.per_step[step.stage.number - 1].total, step_s),
        }

    def _grown(self, grown: ModelConfig) -> Record:
        """Of a run that grows, or stays small: the fractions that have joined, and that val/loss is of."""
        if not self.has_parts:
            return {}
        full = self.config.model
        return {
            "grown/heads": grown.n_heads / full.n_heads,
            "grown/mlp": grown.d_ff / full.d_ff,
            "grown/layers": grown.n_layers / full.n_layers,
        }

    def _speed(self, flops: float, step_s: float) -> Record:
        return {
            "perf/step_s": step_s,
            "perf/tokens_per_s": self.config.tokens_per_step / step_s,
            "perf/mfu": flops / step_s / self.peak if self.peak else None,
        }
