"""The ranks of a run, what each of them holds, and what they compute together (gloo on CPUs, NCCL on GPUs).

The mesh has `replicas` rows of `shards` ranks; a trainer is nothing but its shape:

ddp   (R, 1)                  every rank holds all master weights and moments
fsdp  (1, R)                  every rank holds its share of them
hsdp  (R / shards, shards)    shared among the ranks of a machine, replicated between machines

Matrices [rows, D] are sharded by columns, which are never sampled: a rank holds D / shards columns of every row, so
packing, AdamW and growth need no other rank. Vectors, 0.1% of a model, are whole everywhere.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from est_cli.errors import PeerLost
from est_cli.training.peers import Peers

NORM_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class World:
    """This process among the ranks of its run; a process alone has no mesh.

    `sum_`, `any`, `combine` and `gathered` are collectives: all ranks must call them with tensors of the same shapes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    peers: Peers = field(default_factory=Peers)
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0 writes; the others compute."""
        return self.rank == 0

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
    """Raise PeerLost in the place of what a collective raises when a rank has ended, or does not answer in time."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        if not isinstance(error, dist.DistError) and "gloo" not in words:
            raise
        if "timed out" in words:
            raise PeerLost(
                f"another process of the run has not answered within trainer.collective_timeout_s ({error})"
            ) from error
        raise PeerLost(f"another process of the run has ended ({error})") from error


def join(kind: str, peers: Peers, timeout_s: float = 600.0, shards: int = 1) -> World:
    """Make the mesh of the peers; `kind` is cpu or cuda, and `shards` ranks share one copy of the master weights.

    A collective that takes longer than `timeout_s` fails, and so does one with a rank that has died: see peer_errors.
    """
    if peers.store is None:
        return World(torch.device(kind))
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
        return World(device, peers.rank, peers.size, peers, _mesh(kind, peers.size, shards, timeout))


def _mesh(kind: str, size: int, shards: int, timeout: timedelta) -> DeviceMesh:
    """(replicas, shards), or (shards,) where there is one replica: no all-reduce then follows a reduce-scatter."""
    if shards == size:
        return DeviceMesh.from_group(dist.group.WORLD, kind, mesh_dim_names=("shards",))
    ranks = torch.arange(size).view(-1, shards)
    groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout)[0] for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replicas", "shards"))


def leave() -> None:
    """Leave the group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
