"""The processes of a run: one alone, or the ranks of a process group (gloo on CPUs, NCCL on GPUs)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0 resolves the run directory and writes; the others compute."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add the tensors over all ranks, in place."""
        if self.size == 1:
            return
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Average the tensors over all ranks, in place."""
        if self.size == 1:
            return
        self.sum_(tensors)
        torch._foreach_div_(list(tensors), self.size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def launched_ranks() -> int:
    """Processes of the job that torchrun started, 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def environment_rank() -> int:
    """This process's rank in the job that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def join(kind: str) -> World:
    """Join the process group that torchrun's environment describes; a world of one without it."""
    if launched_ranks() == 1:
        return World(torch.device(kind))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    return World(device, dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
