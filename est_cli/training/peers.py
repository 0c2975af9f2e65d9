"""The processes of a run before they know its config: they agree through the store of who started them.

What they exchange is JSON. No collective is needed, so that others may wait for rank 0 as long as it takes to
tokenize a corpus, and a group of gloo or NCCL is made only when the config says which.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from est_cli.errors import UserError

_Result = TypeVar("_Result")

_TO_START = timedelta(minutes=10)
_AS_LONG_AS_IT_TAKES = timedelta(days=30)
"""Who started the processes ends the others when one dies."""


@dataclass(frozen=True)
class Peers:
    """This process among those of its run; alone where it has no store."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0 resolves the run directory and writes; the others compute."""
        return self.rank == 0

    def agree(self, topic: str, call: Callable[[], _Result], main_first: bool = False) -> _Result:
        """`call()` of every rank, if it went well on all; `main_first` lets rank 0 finish before the others begin.

        Raises UserError on all ranks where any raised it: on rank 0 with the problems of all, so that they are told
        once; on the others with none. `topic` names the exchange and must be used once.
        """
        if self.store is None:
            return call()
        result, problems = None, []
        if not main_first or self.is_main or not self._hear(f"{topic}/0"):
            try:
                result = call()
            except UserError as error:
                problems = list(error.problems)
        self._tell(f"{topic}/{self.rank}", problems)
        told = dict.fromkeys(problem for rank in range(self.size) for problem in self._hear(f"{topic}/{rank}"))
        if told:
            raise UserError(*(told if self.is_main else ()))
        return result

    def from_main(self, topic: str, value: Any) -> Any:
        """Rank 0's value, which JSON can hold, on every rank."""
        if self.store is None:
            return value
        if self.is_main:
            self._tell(topic, value)
        return self._hear(topic)

    def all_here(self) -> None:
        """Wait for the others, who were started at the same time. Raises DistStoreError where one does not come."""
        self._tell(f"here/{self.rank}", True)
        self.store.wait([f"here/{rank}" for rank in range(self.size)], _TO_START)

    @contextlib.contextmanager
    def wait_for_main(self, topic: str) -> Iterator[None]:
        """The other ranks leave the block only when rank 0 has left its own, in any way, however long it takes.

        `topic` names the block and must be used once.
        """
        if self.store is None:
            yield
            return
        try:
            yield
        finally:
            if self.is_main:
                self._tell(f"{topic} left", True)
        if not self.is_main:
            self._hear(f"{topic} left")

    def first_to_fail(self) -> bool:
        """Whether no other rank has failed before: the first failure is the cause, and is told."""
        if self.store is None:
            return True
        try:
            return self.store.compare_set("failed", "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # whoever started the processes is gone, and its store with it
            return True

    def _tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _hear(self, key: str) -> Any:
        self.store.wait([key], _AS_LONG_AS_IT_TAKES)
        return json.loads(self.store.get(key))


def launched_ranks() -> int:
    """Processes of the job that torchrun started, 1 where it did not. Raises UserError for a value of another kind."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or size == "0":
        raise UserError(f"WORLD_SIZE={size}: must be a number of processes; unset it where torchrun did not set it")
    return int(size)


def meet() -> Peers:
    """The processes that torchrun, or `est_cli.runs.launcher`, started; only this one without either.

    Raises UserError where the environment describes no job.
    """
    size = launched_ranks()
    if size == 1:
        return Peers()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size}: {', '.join(missing)} must be set too; start the processes with torchrun, or let "
            "trainer=ddp trainer.devices=N start them and unset WORLD_SIZE"
        )
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun starts ranks again (--max-restarts) with the store that they had, and what they said before is in it.
    start = store.add(f"est/starts/{rank}", 1)
    peers = Peers(rank, size, dist.PrefixStore(f"est/{start}", store))
    peers.all_here()
    return peers
