"""The optimizer of the master weights: AdamW that knows which rows a step has trained."""

import numpy as np
import torch
from torch import Tensor

from est_cli.config import ModelConfig, OptimizerConfig
from est_cli.kernels.adamw import Hyperparameters, Move, Rows
from est_cli.kernels.upload import upload
from est_cli.model.transformer import Transformer, layer_of, row_kind
from est_cli.subnet.plan import whole_plan
from est_cli.subnet.rows import n_rows, sampled_rows
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

    Weight decay is for matrices and embeddings only. What has not joined the model stands still, and its parameters
    have no moments. Of a sharded model every rank moves the parameters that it holds; the others, and their moments,
    are meta tensors.
    """

    def __init__(
        self,
        model: Transformer,
        config: OptimizerConfig,
        shards: Shards | None = None,
        grown: ModelConfig | None = None,
    ):
        self.config, self.kernels, self.shards = config, model.kernels, shards or whole(model)
        self.full = model.config
        self.parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        self.joined: dict[str, Rows | None] = {}
        """The rows of every parameter that have joined; None for all of them."""
        self.moments: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._matrices: dict[str, list[Tensor]] = {}
        self.join(grown or model.config)

    def join(self, grown: ModelConfig) -> None:
        """From now on move what belongs to `grown`; what is new begins with moments of 0."""
        plan = whole_plan(grown)
        for name, parameter in self.parameters.items():
            layer, kind = layer_of(name), row_kind(name)
            if layer is not None and layer >= grown.n_layers:
                continue
            self.joined[name] = None
            if kind is not None and n_rows(kind, grown) != n_rows(kind, self.full):
                host = sampled_rows(kind, self.full, plan, layer)
                self.joined[name] = Rows(host, upload(host, self.shards.world.device))
            if name not in self.moments:
                self.moments[name], self.squares[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                tensors = (parameter, self.moments[name], self.squares[name])
                self._matrices[name] = [as_rows(name, tensor, self.full) for tensor in tensors]
                self.counts[name] = np.zeros(len(self._matrices[name][0]), np.int64)

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
        moves = [self._move(name, by_name.get(name), lr) for name in self.parameters if name in self.joined]
        self.kernels.adamw_step([move for move in moves if move is not None], clip)
        return norm

    def _move(self, name: str, update: Update | None, lr: float) -> Move | None:
        """Count a parameter's step; None where it takes none here."""
        freeze = self.config.unsampled == "freeze"
        if update is None and freeze:
            return None
        rows = update.rows if update else None
        counts, moving = self.counts[name], rows if freeze else self.joined[name]
        counts[slice(None) if moving is None else moving.host] += 1
        if not self.shards.holds(name):
            return None
        matrices = self._matrices[name]
        gradient = None if update is None else update.gradient.reshape(-1, matrices[0].shape[1])
        taken: int | np.ndarray = counts if moving is None else counts[moving.host]
        if not freeze and moving is None and (counts == counts[0]).all():
            taken = int(counts[0])
        elif not freeze:
            # Some rows joined later, or have not: each takes its own step, with gradient 0 where it was not sampled.
            gradient, rows = _spread(gradient, rows, moving, matrices[0]), moving
        return Move(*matrices, gradient, rows, taken, self._hyperparameters(self.parameters[name], lr))

    def _hyperparameters(self, parameter: Tensor, lr: float) -> Hyperparameters:
        decay = self.config.weight_decay if parameter.dim() >= 2 else 0.0
        return Hyperparameters(lr, *self.config.betas, self.config.eps, decay)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the optimizer carries between steps, by name, the widest type first.

        Of what has joined; in the order in which it did.
        """
        return {
            **{f"counts.{name}": torch.from_numpy(c) for name, c in self.counts.items()},
            **{f"moments.{name}": t for name, t in self.moments.items()},
            **{f"squares.{name}": t for name, t in self.squares.items()},
        }


def _spread(gradient: Tensor | None, rows: Rows | None, moving: Rows | None, matrix: Tensor) -> Tensor:
    """The gradient of the rows that move, 0 where `rows` names none; matrix [R, C]."""
    if gradient is not None and (rows is moving or (rows and moving and np.array_equal(rows.host, moving.host))):
        return gradient
    n_moving = len(matrix) if moving is None else len(moving.host)
    spread = matrix.new_zeros((n_moving, matrix.shape[1]))
    if gradient is None:
        return spread
    if rows is None:
        assert moving is None, "what has not joined has no gradient"
        return gradient
    places = rows.host if moving is None else np.searchsorted(moving.host, rows.host)
    return spread.index_copy_(0, upload(places, matrix.device), gradient)
