"""The plan and the tokens of a step; while a GPU works on one step, those of the next are made.

Both are pure functions of the step's number, so a run that ends loses nothing with what was made ahead.
"""

from concurrent.futures import Future, wait

import numpy as np
from torch import Tensor

from est_cli.config import TrainConfig
from est_cli.data.batches import Tokens, training_windows
from est_cli.errors import RunFailed, UserError
from est_cli.kernels.pack import pinned
from est_cli.subnet.plan import Plan
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import stage_at
from est_cli.training.device import in_thread
from est_cli.training.distributed import World


class Inputs:
    """Plans and tokens of a run's steps on this rank."""

    def __init__(self, config: TrainConfig, tokens: Tokens, world: World):
        self.config, self.tokens, self.world, self.stages = config, tokens.train, world, config.stages
        self.end = config.trainer.max_steps if world.device.type == "cuda" else 0
        """Steps before this one are made ahead."""
        self._ahead: dict[int, Future[tuple[Plan, list[Tensor]]]] = {}
        """At most one step: two threads must not read the text together."""

    def of(self, step: int) -> tuple[Plan, list[Tensor]]:
        """The plan, and this rank's token windows [B, T + 1] of every micro-batch, on the host."""
        wait(self._ahead.values())
        found = self._ahead[step].result() if step in self._ahead else self._make(step)
        self._ahead = {step + 1: in_thread(lambda: self._make(step + 1))} if step + 1 < self.end else {}
        return found

    def of_all_ranks(self, step: int) -> np.ndarray:
        """The token windows of a step, of every rank and micro-batch in order: [n, T + 1]."""
        wait(self._ahead.values())
        n = self.config.sequences_per_step
        return self._windows(step * n, n)

    def error(self, step: int) -> UserError | RunFailed | None:
        """Why the text of a step cannot be read on this or another rank, if it is read while the run trains.

        A collective; waits for the text.
        """
        if isinstance(self.tokens, np.ndarray):
            return None
        error = None
        try:
            self.of_all_ranks(step)
        except (UserError, RunFailed) as raised:
            error = raised
        return error or UserError() if self.world.any(error is not None) else None

    def _make(self, step: int) -> tuple[Plan, list[Tensor]]:
        config, world, size = self.config, self.world, self.config.trainer.batch_size
        plan = sample(config.seed, step, stage_at(self.stages, step), config.model, config.sampling)
        start = step * config.sequences_per_step + world.rank * size
        firsts = [start + micro * world.size * size for micro in range(config.trainer.grad_accum)]
        return plan, [pinned(self._windows(first, size), world.device) for first in firsts]

    def _windows(self, first: int, n: int) -> np.ndarray:
        return training_windows(self.tokens, self.config.data.seq_len, self.config.seed, first, n)
