"""The optimizer of the master weights: AdamW that knows which rows a step has trained, and which have joined."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from est_cli.config import ModelConfig, OptimizerConfig
from est_cli.kernels.adamw import Hyperparameters, Move
from est_cli.model.transformer import Transformer, layer_of, row_kind, with_layer
from est_cli.subnet.plan import Growth, n_rows, sampled_rows, whole_plan
from est_cli.subnet.schedule import boundary_step
from est_cli.training.profile import phase
from est_cli.training.stacks import Stack, adjacent, as_rows, rows_in, stack_master
from est_cli.training.subnetwork import Update


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
"""The part of the decay that is still to come after the fraction `progress` of its steps."""

_OUTPUTS = ("attention.out.weight", "attention.out.bias", "mlp.down.weight", "mlp.down.bias")


@dataclass
class _State:
    """The moments and step counts of a master stack, for its first rows: the layers that have joined."""

    stack: Stack
    moments: Stack
    squares: Stack
    counts: np.ndarray
    """Steps that every row took."""
    joined: np.ndarray | None
    """The rows that have joined; None for all of them."""
    decays: bool


class SampledAdamW:
    """AdamW on the master, given the gradients of sampled rows.

    unsampled=zero_grad  every row takes every step, with gradient 0 if it was not sampled
    unsampled=freeze     only sampled rows, their moments and their step counts move

    Weight decay is for matrices and embeddings only. What has not joined the model stands still, and its parameters
    have no moments. Every operation works row by row, so a rank moves its columns as if they were a narrower model.
    """

    def __init__(self, model: Transformer, config: OptimizerConfig, grown: ModelConfig | None = None):
        self.config, self.kernels, self.full = config, model.kernels, model.config
        self._stacks = stack_master(model)
        self._states: dict[int, _State] = {}
        self.parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        self.moments: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._counted: list[tuple[np.ndarray, slice | np.ndarray]] = []
        self._unsure: list[list[tuple[np.ndarray, slice | np.ndarray]]] = []
        """For every unconfirmed step the counts that it raised."""
        self.join(grown or model.config)

    def join(self, grown: ModelConfig) -> None:
        """Move what belongs to `grown` from now on; what is new begins with moments of 0."""
        for number, stack in enumerate(self._stacks):
            names = [name for name in stack.places if layer_of(name) is None or layer_of(name) < grown.n_layers]
            if names:
                self._states[number] = self._state(stack, names, grown, self._states.get(number))
        for state in self._states.values():
            self.moments |= state.moments.views(self.parameters)
            self.squares |= state.squares.views(self.parameters)
            self.counts |= {name: state.counts[place] for name, place in state.moments.places.items()}

    def _state(self, stack: Stack, names: list[str], grown: ModelConfig, before: _State | None) -> _State:
        n, plan = stack.places[names[-1]].stop, whole_plan(grown)
        kinds = [(name, row_kind(name)) for name in names]
        rows = [sampled_rows(kind, self.full, plan, layer_of(name)) if kind else None for name, kind in kinds]
        joined = np.concatenate([rows_in(stack.places[name], r) for name, r in zip(names, rows, strict=True)])
        joined = None if len(joined) == n else joined
        if before is not None and len(before.counts) == n:
            return replace(before, joined=joined)
        decays = self.parameters[names[0]].dim() >= 2
        state = _State(stack, stack.zeros(n), stack.zeros(n), np.zeros(n, np.int64), joined, decays)
        if before is not None:
            old = slice(0, len(before.counts))
            state.moments.matrix[old], state.squares.matrix[old] = before.moments.matrix, before.squares.matrix
            state.counts[old] = before.counts
        return state

    @torch.no_grad()
    def grow(self, growth: Growth, moments: Literal["copy", "reset"]) -> None:
        """Grow the model in place: what joins starts from what was trained.

        A copied layer brings its moments and step counts. With `moments="reset"` only the copies that count as trained
        layers do, and those that join begin with none.
        """
        self.join(growth.after)
        joined = set(growth.joined)
        for layer, source in reversed(list(enumerate(growth.sources))):
            for name in self._of_layer(layer) if source != layer else ():
                if source is not None:
                    resets = layer in joined and moments == "reset"
                    self._copy(with_layer(name, source), name, resets)
                elif growth.method == "zero" and name.endswith(_OUTPUTS):
                    self.parameters[name].zero_()
        self._silence_new_units(growth)

    def _copy(self, source: str, name: str, resets: bool) -> None:
        self.parameters[name].copy_(self.parameters[source])
        for tensors in (self.moments, self.squares):
            if resets:
                tensors[name].zero_()
            else:
                tensors[name].copy_(tensors[source])
        self.counts[name][:] = 0 if resets else self.counts[source]

    def _silence_new_units(self, growth: Growth) -> None:
        """Heads and neurons that join begin with output rows of 0: the function stays."""
        plan = whole_plan(growth.before)
        for layer in range(growth.before.n_layers):
            for name in self._of_layer(layer):
                kind = row_kind(name)
                if kind in ("heads", "neurons") and n_rows(kind, growth.before) != n_rows(kind, growth.after):
                    old = sampled_rows(kind, self.full, plan, layer)
                    new = torch.from_numpy(np.setdiff1d(np.arange(n_rows(kind, self.full)), old))
                    as_rows(name, self.parameters[name], self.full)[new] = 0.0

    def _of_layer(self, layer: int) -> list[str]:
        return [name for name in self.parameters if layer_of(name) == layer]

    @phase("norm")
    @torch.no_grad()
    def norm(self, updates: list[Update]) -> Tensor:
        """The global norm of the gradients, a scalar tensor."""
        return torch.nn.utils.get_total_norm([update.gradient for update in updates])

    @phase("optimizer")
    @torch.no_grad()
    def step(
        self, updates: list[Update], lr: float, norm: Tensor | None = None, refused: Tensor | None = None
    ) -> Tensor:
        """Clip by the global norm and move; returns the norm before clipping, a scalar tensor.

        If `refused`, a scalar tensor, is 1, nothing moves. The step is counted all the same, until `forget`.
        """
        norm = self.norm(updates) if norm is None else norm
        clip = None if self.config.grad_clip is None else (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        by_name = {update.name: update for update in updates}
        alike = len(by_name) == len(self.counts) and self._counts_are_one()
        moves = [move for state in self._states.values() for move in self._moves(state, by_name, lr, alike)]
        self.kernels.adamw_step(moves, clip, refused)
        if refused is not None:
            self._unsure.append(self._counted)
        self._counted = []
        return norm

    def confirm(self) -> None:
        """The oldest unconfirmed step was taken."""
        del self._unsure[0]

    def forget(self) -> None:
        """No unconfirmed step was taken: they do not count."""
        for counts, rows in itertools.chain(*self._unsure):
            counts[rows] -= 1
        self._unsure.clear()

    def _counts_are_one(self) -> bool:
        """Whether all rows of all layers took equally many steps."""
        found = {int(state.counts[0]) for state in self._states.values()}
        return len(found) == 1 and all((state.counts == state.counts[0]).all() for state in self._states.values())

    def _moves(self, state: _State, updates: Mapping[str, Update], lr: float, alike: bool) -> list[Move]:
        """Count the step in a stack and return its moves: rows that took equally many steps move together.

        Under `freeze` the rows of layers do so only if all are `alike`, so that the bits do not depend on which
        parameters share a stack.
        """
        own = {name: updates[name] for name in state.moments.places if name in updates}
        sampled = [rows_in(state.stack.places[name], update.rows) for name, update in own.items()]
        host = np.concatenate(sampled) if sampled else np.empty(0, np.int64)
        rows = None if len(host) == len(state.counts) else host
        freeze = self.config.unsampled == "freeze"
        moving = rows if freeze else state.joined
        counted = slice(None) if moving is None else moving
        state.counts[counted] += 1
        self._counted.append((state.counts, counted))
        if freeze and not own:
            return []
        columns = state.stack.matrix.shape[1]
        gradients = adjacent([update.gradient.reshape(-1, columns) for update in own.values()])
        decay = self.config.weight_decay if state.decays else 0.0
        hyper = Hyperparameters(lr, *self.config.betas, self.config.eps, decay)
        matrices = (stack.matrix[: len(state.counts)] for stack in (state.stack, state.moments, state.squares))
        ends = [place.stop for place in state.moments.places.values()]
        move = Move(*matrices, gradients, rows, 0, hyper, ends)
        if freeze and (rows is not None or not (alike or layer_of(next(iter(own))) is None)):
            return [replace(move, counts=state.counts[host])]
        parts = _equal_counts(state.counts, state.joined)
        return [replace(move.part(start, stop), counts=count) for start, stop, count in parts]

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the optimizer carries between steps, by name; only of what has joined."""
        return {
            **{f"counts.{name}": torch.from_numpy(c) for name, c in self.counts.items()},
            **{f"moments.{name}": t for name, t in self.moments.items()},
            **{f"squares.{name}": t for name, t in self.squares.items()},
        }


def _equal_counts(counts: np.ndarray, joined: np.ndarray | None) -> Iterator[tuple[int, int, int]]:
    """First row, end, and steps of each stretch of rows that have joined and took equally many steps."""
    marks = counts
    if joined is not None:
        marks = np.full_like(counts, -1)
        marks[joined] = counts[joined]
    starts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist()]
    for start, stop in zip(starts, [*starts[1:], len(marks)], strict=True):
        if marks[start] >= 0:
            yield start, stop, int(marks[start])
