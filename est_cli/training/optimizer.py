"""The optimizer of the master weights: AdamW that knows which rows a step has trained."""

import numpy as np
import torch
from torch import Tensor

from est_cli.config import OptimizerConfig
from est_cli.kernels.adamw import Hyperparameters, Move
from est_cli.model.transformer import Transformer
from est_cli.subnet.schedule import boundary_step
from est_cli.training.shards import Shards, whole
from est_cli.training.subnetwork import Update, as_rows


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The rate of optimizer step `step`: linear warmup, then decay to min_lr_ratio; one schedule over all stages.

    The decay reaches min_lr_ratio one step after its last one: a run's last step is just above it.
    """
    warmup = boundary_step(config.warmup, max_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    start, end = config.decay_start(max_steps), config.decay_end(max_steps)
    if config.decay == "none" or step < start:
        return config.lr
    progress = min(1.0, (step - start) / max(1, end - start))
    shape = _SHAPES[config.decay_shape if config.decay == "wsd" else config.decay](progress)
    return float(config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape))


_SHAPES = {
    "cosine": lambda progress: 0.5 * (1.0 + np.cos(np.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - np.sqrt(progress),
}
"""What is left of a decay's way after the fraction `progress` of its steps."""


class SampledAdamW:
    """AdamW on the master, given the gradients of sampled rows.

    unsampled=zero_grad  every row takes every step, with gradient 0 where it was not sampled
    unsampled=freeze     only sampled rows, their moments and their step counts move

    Weight decay is for matrices and embeddings only. Of a sharded model every rank moves the parameters that it
    holds; the others, and their moments, are meta tensors.
    """

    def __init__(self, model: Transformer, config: OptimizerConfig, shards: Shards | None = None):
        self.config, self.kernels, self.shards = config, model.kernels, shards or whole(model)
        self.parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        self.moments = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.squares = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._matrices = {
            name: [as_rows(name, t, model.config) for t in (p, self.moments[name], self.squares[name])]
            for name, p in self.parameters.items()
        }
        self.counts = {name: np.zeros(len(rows), np.int64) for name, (rows, _, _) in self._matrices.items()}

    @torch.no_grad()
    def norm(self, updates: list[Update]) -> Tensor:
        """The global norm of the gradients, a scalar tensor."""
        return self.shards.norm({update.name: update.gradient for update in updates})

    @torch.no_grad()
    def step(self, updates: list[Update], lr: float, norm: Tensor | None = None) -> Tensor:
        """Clip by the global norm and move; returns the norm before clipping, a scalar tensor."""
        norm = self.norm(updates) if norm is None else norm
        clip = None if self.config.grad_clip is None else (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        by_name = {update.name: update for update in updates}
        moves = [self._move(name, by_name.get(name), lr) for name in self.parameters]
        self.kernels.adamw_step([move for move in moves if move is not None], clip)
        return norm

    def _move(self, name: str, update: Update | None, lr: float) -> Move | None:
        """Count a parameter's step; None where it takes none here."""
        freeze = self.config.unsampled == "freeze"
        if update is None and freeze:
            return None
        rows = update.rows if update else None
        counts = self.counts[name]
        moving = slice(None) if rows is None or not freeze else rows.host
        counts[moving] += 1
        if not self.shards.holds(name):
            return None
        matrices = self._matrices[name]
        gradient = None if update is None else update.gradient.reshape(-1, matrices[0].shape[1])
        taken = counts[moving] if freeze else int(counts[0])
        return Move(*matrices, gradient, rows, taken, self._hyperparameters(self.parameters[name], lr))

    def _hyperparameters(self, parameter: Tensor, lr: float) -> Hyperparameters:
        decay = self.config.weight_decay if parameter.dim() >= 2 else 0.0
        return Hyperparameters(lr, *self.config.betas, self.config.eps, decay)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the optimizer carries between steps, by name, the widest type first."""
        return {
            **{f"counts.{name}": torch.from_numpy(c) for name, c in self.counts.items()},
            **{f"moments.{name}": t for name, t in self.moments.items()},
            **{f"squares.{name}": t for name, t in self.squares.items()},
        }
