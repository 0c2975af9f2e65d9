"""What the next step needs, made while the device works on this one.

Plan and tokens are functions of the step's number alone, so that nothing is lost with what was made ahead.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from est_cli.config import TrainConfig
from est_cli.data.batches import WindowSource, training_windows
from est_cli.kernels.upload import pinned
from est_cli.training.distributed import World

Made = TypeVar("Made")


def rank_windows(config: TrainConfig, tokens: np.ndarray | WindowSource, world: World, step: int) -> list[Tensor]:
    """A rank's token windows of every micro-batch of a step: [B, T + 1] each, on the host."""
    size, found = config.trainer.batch_size, []
    for micro in range(config.trainer.grad_accum):
        first = step * config.sequences_per_step + (micro * world.size + world.rank) * size
        found.append(training_windows(tokens, config.data.seq_len, config.seed, first, size))
    return [pinned(windows, world.device) for windows in found]


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
