"""What a step needs, its plan and its tokens; on a GPU those of the next step are made while it works on this one.

Both are pure functions of the step's number, so a run that ends loses nothing with what was made ahead.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from est_cli.config import TrainConfig
from est_cli.data.batches import Tokens, reading_error, training_windows
from est_cli.errors import UserError
from est_cli.kernels.pack import pinned
from est_cli.subnet.plan import Plan
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import stage_at
from est_cli.training.distributed import World

Made = TypeVar("Made")


class Inputs:
    """Plans and tokens of a run's steps on this rank; ahead of time for steps before `end`."""

    def __init__(self, config: TrainConfig, tokens: Tokens, world: World, end: int):
        self.config, self.tokens, self.world, self.stages = config, tokens.train, world, config.stages
        self.ahead = Ahead(self._make, end)

    def of(self, step: int) -> tuple[Plan, list[Tensor]]:
        """The plan, and this rank's token windows [B, T + 1] of every micro-batch, on the host."""
        return self.ahead.of(step)

    def of_all_ranks(self, step: int) -> np.ndarray:
        """The token windows of a step, of every rank and micro-batch in order: [n, T + 1]."""
        self.ahead.finish()
        n = self.config.sequences_per_step
        return self._windows(step * n, n)

    @property
    def are_streamed(self) -> bool:
        """The text is read while the run trains, so reading may fail."""
        return not isinstance(self.tokens, np.ndarray)

    def error(self, step: int) -> UserError | None:
        """Why the text of a step cannot be read, if so; waits for it."""
        return reading_error(lambda: self.of_all_ranks(step))

    def _make(self, step: int) -> tuple[Plan, list[Tensor]]:
        config, world, size = self.config, self.world, self.config.trainer.batch_size
        plan = sample(config.seed, step, stage_at(self.stages, step), config.model, config.sampling)
        start = step * config.sequences_per_step + world.rank * size
        firsts = [start + micro * world.size * size for micro in range(config.trainer.grad_accum)]
        return plan, [pinned(self._windows(first, size), world.device) for first in firsts]

    def _windows(self, first: int, n: int) -> np.ndarray:
        return training_windows(self.tokens, self.config.data.seq_len, self.config.seed, first, n)


class Ahead(Generic[Made]):
    """`make(step)` of one step after the other; the one after the step that is asked for is made in a thread.

    At most one call of `make` runs at a time, and none ahead for steps from `end` on.
    """

    def __init__(self, make: Callable[[int], Made], end: int):
        self.make, self.end = make, end
        self._next: _Making | None = None

    def of(self, step: int) -> Made:
        """What `make` returns for the step, or raises."""
        made = self.finish()
        found = made.result() if made is not None and made.step == step else self.make(step)
        if step + 1 < self.end:
            self._next = _Making(self.make, step + 1)
        return found

    def finish(self) -> "_Making | None":
        """Wait for the thread, if there is one; what it made is given back once."""
        made, self._next = self._next, None
        if made is not None:
            made.thread.join()
        return made


class _Making:
    """A call of `make` in a thread, which a process that ends does not wait for."""

    def __init__(self, make: Callable[[int], Made], step: int):
        self.step = step
        self._made: Made | None = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self.thread.start()

    def _run(self, make: Callable[[int], Made]) -> None:
        try:
            self._made = make(self.step)
        except BaseException as error:
            self._error = error

    def result(self) -> Made:
        if self._error is not None:
            raise self._error
        return self._made
