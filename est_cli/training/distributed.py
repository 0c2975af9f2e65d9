"""What the ranks of a run compute together (gloo on CPUs, NCCL on GPUs). A process alone is a world of one."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from est_cli.errors import PeerLost
from est_cli.training.peers import Peers

BUCKET_BYTES = 4 << 20
"""Tensors travel together up to this size, and larger ones alone: a message costs microseconds whatever its size."""


@dataclass(frozen=True)
class World:
    """This process among its peers. What it is asked, all ranks must ask together, of tensors of the same shapes.

    Raises PeerLost where another rank has ended, or does not answer in time.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    peers: Peers = field(default_factory=Peers)

    @property
    def is_main(self) -> bool:
        """Rank 0 writes; the others compute."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add the tensors over all ranks, in place."""
        self._travel([(tensors, partial(dist.all_reduce, async_op=True))])

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Average the tensors over all ranks, in place."""
        self.sum_(tensors)
        if self.size > 1:
            torch._foreach_div_(list(tensors), self.size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        self.sum_([tensor])
        return bool(tensor.item())

    def sum_on_(self, tensors: Mapping[int, Sequence[Tensor]]) -> None:
        """Add the tensors over all ranks on the rank that they are listed under; they are lost on the others."""
        self._travel([(group, partial(dist.reduce, dst=rank, async_op=True)) for rank, group in tensors.items()])

    def broadcast_(self, tensors: Mapping[int, Sequence[Tensor]]) -> None:
        """Give all ranks the tensors of the rank that they are listed under."""
        self._travel([(group, partial(dist.broadcast, src=rank, async_op=True)) for rank, group in tensors.items()])

    def number_from_main(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        tensor = torch.tensor(number, device=self.device)
        self.broadcast_({0: [tensor]})
        return int(tensor.item())

    def send_to_main(self, tensor: Tensor) -> None:
        with _told_of_lost_peers():
            dist.send(tensor.contiguous(), 0)

    def receive(self, like: Tensor, source: int) -> Tensor:
        """On rank 0: the tensor of this shape and type that rank `source` sends."""
        tensor = torch.empty_like(like, device=self.device)
        with _told_of_lost_peers():
            dist.recv(tensor, source)
        return tensor

    def _travel(self, groups: Sequence[tuple[Sequence[Tensor], Callable[[Tensor], dist.Work]]]) -> None:
        """Hand each group of tensors to its operation in buckets, and wait until all have their new values."""
        if self.size == 1:
            return
        with _told_of_lost_peers():
            sent = []
            for tensors, send in groups:
                for bucket in _buckets(tensors):
                    flat = _flat(bucket)
                    sent.append((send(flat), flat, bucket))
            for work, _, _ in sent:
                work.wait()
        for _, flat, bucket in sent:
            if len(bucket) > 1:
                parts = flat.split([tensor.numel() for tensor in bucket])
                torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type each, in the same order on every rank: large ones alone, small ones up to BUCKET_BYTES."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = small.setdefault(tensor.dtype, [])
        if tensor.nbytes >= BUCKET_BYTES:
            yield [tensor]
            continue
        if sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = small[tensor.dtype] = []
        bucket.append(tensor)
    yield from filter(None, small.values())


def _flat(bucket: list[Tensor]) -> Tensor:
    return bucket[0] if len(bucket) == 1 else torch.cat([tensor.reshape(-1) for tensor in bucket])


@contextlib.contextmanager
def _told_of_lost_peers() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # this process's own
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            raise PeerLost(
                f"another process of the run has not answered within trainer.collective_timeout_s ({error})"
            ) from error
        raise PeerLost(f"another process of the run has ended ({error})") from error


def join(kind: str, peers: Peers, timeout_s: float = 600.0) -> World:
    """Make the group of the peers; `kind` is cpu or cuda.

    A collective that takes longer than `timeout_s` raises PeerLost. A rank that dies is noticed at once.
    """
    if peers.store is None:
        return World(torch.device(kind))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    with _told_of_lost_peers():
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=dist.PrefixStore("group", peers.store),
            rank=peers.rank,
            world_size=peers.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if kind == "cuda" else None,
        )
    return World(device, peers.rank, peers.size, peers)


def leave() -> None:
    """Leave the group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
