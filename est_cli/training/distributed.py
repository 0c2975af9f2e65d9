"""The processes of a run: how they meet, what each of them holds, and what they compute together.

They meet (`meet`) before they know the config, in the store of the launcher that started them. They exchange JSON
there, and may wait for rank 0 for as long as it tokenizes a corpus. When the config says which devices to use, they
join in a mesh (`join`; gloo on CPUs, NCCL on GPUs) of `replicas` rows of `shards` ranks. The trainer sets its shape:

ddp   (R, 1)                  every rank holds all master weights and moments
fsdp  (1, R)                  every rank holds its share of them
hsdp  (R / shards, shards)    shared among the ranks of a machine, replicated between machines

Matrices [rows, D] are sharded by columns, which are never sampled: a rank holds D / shards columns of every row, so
packing, AdamW and growth need no other rank. Vectors, 0.1% of a model, are whole everywhere.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from est_cli.errors import PeerLost, UserError

NORM_ELEMENTS = 1 << 22
_Result = TypeVar("_Result")
_TO_START = timedelta(minutes=10)
AS_LONG_AS_IT_TAKES = timedelta(days=30)
"""If a process dies, the launcher ends the others."""


@dataclass(frozen=True)
class Peers:
    """This process among those of its run; the only one if there is no store. A topic names one exchange."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0 resolves the run directory and writes; the others compute."""
        return self.rank == 0

    def agree(self, topic: str, call: Callable[[], _Result], main_first: bool = False) -> _Result:
        """This rank's `call()`; `main_first` lets rank 0 finish before the others begin.

        Raises UserError on all ranks if it is raised on any: on rank 0 with the problems of all, on the others with
        none, so they are told once.
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

    @contextlib.contextmanager
    def wait_for_main(self, topic: str) -> Iterator[None]:
        """The other ranks leave the block after rank 0, however long it takes and however it ends."""
        try:
            yield
        finally:
            if self.is_main and self.store is not None:
                self._tell(topic, True)
        if not self.is_main:
            self._hear(topic)

    def first_to_fail(self) -> bool:
        """Whether no other rank failed before this one. Only the first failure, the cause, is told."""
        if self.store is None:
            return True
        try:
            return self.store.compare_set("failed", "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # whoever started the processes is gone, and its store with it
            return True

    def _tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _hear(self, key: str) -> Any:
        self.store.wait([key], AS_LONG_AS_IT_TAKES)
        return json.loads(self.store.get(key))


def launched_ranks() -> int:
    """Processes of the job that torchrun started, 1 without it. Raises UserError for a value of another kind."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or size == "0":
        raise UserError(f"WORLD_SIZE={size}: must be a number of processes; unset it where torchrun did not set it")
    return int(size)


def meet() -> Peers:
    """The processes that torchrun, or `est_cli.runs.launcher`, started; only this one without either.

    Raises UserError if the environment describes no job, and DistStoreError if a process does not come.
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
    store = dist.PrefixStore(f"est/{store.add(f'est/starts/{rank}', 1)}", store)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(size)], _TO_START)
    return Peers(rank, size, store)


@dataclass(frozen=True, kw_only=True)
class World(Peers):
    """The peers with a device each, and the mesh in which they share the model; a single process has no mesh.

    `sum_`, `any`, `combine` and `gathered` are collectives: all ranks must call them with tensors of the same shapes.
    """

    device: torch.device
    mesh: DeviceMesh | None = None

    @cached_property
    def shards(self) -> int:
        """Ranks that share one copy of the master weights."""
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    def own(self, whole: Tensor) -> Tensor:
        """What this rank holds of a tensor: its columns of a matrix [rows, D], all of anything else."""
        if self.shards == 1 or whole.dim() != 2:
            return whole
        return whole.chunk(self.shards, dim=1)[self.mesh.get_local_rank(self.mesh.ndim - 1)].contiguous()

    def full(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that this rank holds as parts of whole ones: DTensors, which share their memory.

        Step counts are the same on every rank, and stay what they are.
        """
        if self.mesh is None:
            return dict(held)
        from torch.distributed.tensor import DTensor, Replicate, Shard  # half a second, which one process never needs

        def part(tensor: Tensor) -> Tensor:
            placements = [Replicate()] * self.mesh.ndim
            if tensor.dim() == 2:
                placements[-1] = Shard(1)
            return DTensor.from_local(tensor, self.mesh, placements, run_check=False)

        return {name: part(t) if t.is_floating_point() else t for name, t in held.items()}

    def gathered(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 the whole tensors, in the memory of its host; nothing on the others."""
        if self.mesh is None:
            return dict(full)
        found = {}
        for name, tensor in full.items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.is_main:
                found[name] = whole.cpu()
        return found

    def sum_(self, tensor: Tensor) -> None:
        """Add the tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        self.sum_(tensor)
        return bool(tensor.item())

    def combine(
        self, loss: Tensor, sharded: Sequence[Tensor], whole: Sequence[Tensor], flag: bool
    ) -> tuple[Tensor, Tensor]:
        """The norm of all gradients, and how many ranks set the flag: scalar tensors, by one all-reduce.

        `sharded` are this rank's columns of gradients that the backward pass has averaged. The loss and the `whole`
        gradients are averaged here, in place. Sums are in fp64, so that they hardly depend on the mesh.
        """
        if self.size == 1:
            return torch.nn.utils.get_total_norm([*sharded, *whole]), torch.tensor(float(flag))
        replicas = self.size // self.shards
        facts = torch.stack([loss.double(), loss.new_tensor(flag, dtype=torch.float64), _square(sharded) / replicas])
        flat = torch.cat([facts, *(gradient.reshape(-1).double() for gradient in whole)])
        self.sum_(flat)
        total, asked, square = flat[:3].unbind()
        loss.copy_(total / self.size)
        parts = (flat[3:] / self.size).split([gradient.numel() for gradient in whole])
        for gradient, part in zip(whole, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return (square + _square(whole)).sqrt().float(), asked


def _square(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares, in fp64; a CPU copies what it converts, so it gets parts."""
    parts = [part for tensor in tensors for part in tensor.reshape(-1).split(NORM_ELEMENTS)]
    return torch.stack(torch._foreach_norm(parts, 2, torch.float64)).square().sum()


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Raise PeerLost instead of a collective's error when a rank has ended, or does not answer in time."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        if not isinstance(error, dist.DistError) and "gloo" not in words:
            raise
        late = "timed out" in words
        what = "has not answered within trainer.collective_timeout_s" if late else "has ended"
        raise PeerLost(f"another process of the run {what} ({error})") from error


def join(kind: str, peers: Peers, timeout_s: float = 600.0, shards: int = 1) -> World:
    """Make the mesh of the peers; `kind` is cpu or cuda, and `shards` ranks share one copy of the master weights.

    A collective that takes longer than `timeout_s` fails, and so does one with a rank that has died: see peer_errors.
    """
    if peers.store is None:
        return World(device=torch.device(kind))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    with peer_errors():
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=dist.PrefixStore("group", peers.store),
            rank=peers.rank,
            world_size=peers.size,
            timeout=timeout,
            device_id=device if kind == "cuda" else None,
        )
        return World(**vars(peers), device=device, mesh=_mesh(kind, peers.size, shards, timeout))


def _mesh(kind: str, size: int, shards: int, timeout: timedelta) -> DeviceMesh:
    """(replicas, shards), or (shards,) if there is one replica: no all-reduce then follows a reduce-scatter."""
    if shards == size:
        return DeviceMesh.from_group(dist.group.WORLD, kind, mesh_dim_names=("shards",))
    ranks = torch.arange(size).view(-1, shards)
    groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout)[0] for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replicas", "shards"))


def leave() -> None:
    """Leave the group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
