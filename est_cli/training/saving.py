"""When the checkpoints of a run are written, and what is said of them.

If the ranks share the state, it is written beside training, and training hears of it when it is done; it waits before
it begins the next one, and before it ends. Otherwise rank 0 writes, and all ranks wait for it.
"""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from est_cli.errors import PeerLost, RunFailed, UserError
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import AS_LONG_AS_IT_TAKES, World

Tensors = Mapping[str, Tensor]


class Saving:
    """A run's checkpoints while it trains. As a context it waits at the end for what is still being written."""

    def __init__(self, checkpoints: Checkpoints, world: World, say: Callable[[str], None], step: int | None):
        self.checkpoints, self.world, self.say = checkpoints, world, say
        self.step = step
        """The step of the newest checkpoint."""
        self._writing: tuple[int, Future[Path | None]] | None = None
        self._told_of_unwritten = False

    def save(self, step: int, weights: Tensors, moments: Tensors | None, facts: dict[str, Any], is_last: bool) -> None:
        """Write a checkpoint unless there is one of this step; the last one is written on return. A collective.

        If the disk does not take it, training goes on, but cannot end: raises RunFailed.
        """
        self.hear(waits=True)
        if self.step == step:
            return
        if self.world.shards > 1:
            from est_cli.training import sharded_checkpoint  # more than a second, which one process never needs

            written = sharded_checkpoint.begin(self.checkpoints, step, weights, moments, facts, self._group)
        else:
            written = self._write_by_main(step, weights, moments, facts)
        self._writing = step, written
        self.hear(waits=is_last, is_last=is_last)

    def hear(self, waits: bool = False, is_last: bool = False) -> None:
        """Say how the checkpoint that is being written ended, if it has; `waits` for that."""
        if self._writing is None or not (waits or self._writing[1].done()):
            return
        (step, written), self._writing = self._writing, None
        try:
            path = written.result()
        except OSError as error:
            before = "there is none before it" if self.step is None else f"step {self.step}'s stays"
            message = f"the checkpoint of step {step} could not be written ({error.strerror or error}); {before}"
            if is_last:
                raise RunFailed(message) from error
            if not self._told_of_unwritten:
                self.say(f"{message}; training goes on")
            self._told_of_unwritten = True
        else:
            self.step = step
            self.say(f"checkpoint written: {path}")

    def _write_by_main(self, step: int, weights: Tensors, moments: Tensors | None, facts: dict[str, Any]) -> "Future":
        weights, moments = self.world.gathered(weights), moments and self.world.gathered(moments)
        written: Future[Path | None] = Future()
        path, raised = None, None
        # Rank 0 may write for longer than a collective may take.
        with self.world.peers.wait_for_main(f"checkpoint {step}"):
            try:
                path = self.checkpoints.save(step, weights, moments, facts) if self.world.is_main else None
            except OSError as error:
                raised = error
        if self.world.any(raised is not None):
            written.set_exception(raised or OSError("rank 0 could not write it"))
        else:
            written.set_result(path)
        return written

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        """Collectives of two threads in one group could meet each other's: the thread that writes has its own.

        A slow disk must not end a run; a rank that dies is noticed at once.
        """
        return dist.new_group(backend="gloo", timeout=AS_LONG_AS_IT_TAKES)

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Wait for the last write if all ranks end in the same way; if one is lost, what it writes is lost too."""
        if error is None:
            self.hear(waits=True)
        elif isinstance(error, RunFailed | UserError) and not isinstance(error, PeerLost):
            with contextlib.suppress(RuntimeError):
                self.hear(waits=True)
