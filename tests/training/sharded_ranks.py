"""What the ranks of test_checkpoint.py do: a state made by hand, spread over a mesh as the trainers do it."""

import errno
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from est_cli.training import sharded_checkpoint
from est_cli.training.checkpoint import Checkpoints
from tests.training.ranks import run_ranks

FACTS = {"train_s": 1.5, "val_loss": 2.5}


def state(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole weights and moments; as in training, the matrices of two layers are views of one stack."""
    draw = torch.Generator().manual_seed(seed)
    stack = torch.randn(10, 8, generator=draw)
    weights = {"b.0.mlp": stack[:5], "b.1.mlp": stack[5:], "b.0.norm": torch.randn(8, generator=draw)}
    moments = {f"moments.{name}": torch.randn(t.shape, generator=draw) for name, t in weights.items()}
    counts = {f"counts.{name}": torch.randint(99, t.shape[:1], generator=draw) for name, t in weights.items()}
    return weights, {**counts, **moments}


class Rank:
    """One of `shape`'s ranks; a mesh of (replicas, shards), or of (shards,)."""

    def __init__(self, rank: int, shape: tuple[int, ...], folder: Path):
        self.rank, self.folder = rank, folder
        self.mesh = init_device_mesh("cpu", shape)
        self.group = dist.new_group(backend="gloo")

    def spread(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds, as DTensors; views of one stack stay views of one."""
        found, stacks = {}, {}
        for name, tensor in whole.items():
            if not tensor.is_floating_point():
                found[name] = tensor
                continue
            placements = [Replicate()] * self.mesh.ndim
            if tensor.dim() == 2:
                placements[-1] = Shard(1)
                columns = tensor.untyped_storage().data_ptr()
                if columns not in stacks:
                    base = tensor if tensor._base is None else tensor._base
                    parts = base.chunk(self.mesh.size(self.mesh.ndim - 1), dim=1)
                    stacks[columns] = parts[self.mesh.get_local_rank(self.mesh.ndim - 1)].contiguous()
                first = tensor.storage_offset() // tensor.shape[1]
                tensor = stacks[columns][first : first + len(tensor)]
            found[name] = DTensor.from_local(tensor, self.mesh, placements, run_check=False)
        return found

    def begin(self, step: int, seed: int):
        held = [self.spread(part) for part in state(seed)]
        return held, Checkpoints(self.folder).begin_sharded(step, *held, FACTS, self.group)

    def load(self, folder: Path, seed: int) -> None:
        """Asserts that the newest checkpoint of `folder` is the state of this seed, each tensor as it is held here."""
        found = Checkpoints(folder).newest(_not_said)
        weights, moments = (self.spread(part) for part in state(seed + 1))
        found.load_weights(weights)
        found.load_moments(moments)
        for ours, whole in zip((weights, moments), state(seed), strict=True):
            for name, expected in self.spread(whole).items():
                a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (ours[name], expected))
                assert torch.equal(a, b), name


def save_and_go_on(rank: Rank) -> None:
    """Step 3, of a state that changes while it is written; then loaded again."""
    held, saving = rank.begin(3, seed=3)
    for tensor in (*held[0].values(), *held[1].values()):
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(0)
    path = saving.result(60)
    assert path == (rank.folder / "step-00000003" if rank.rank == 0 else None)
    dist.barrier(rank.group)
    rank.load(rank.folder, seed=3)


def no_room(rank: Rank) -> None:
    """Rank 1's disk is full at step 5, rank 0's at step 6: both ranks get it each time, and step 7 is written."""
    write, complete = sharded_checkpoint._Writer.write_data, Checkpoints._complete

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step, owner, name, original, at in (
        (5, sharded_checkpoint._Writer, "write_data", write, 1),
        (6, Checkpoints, "_complete", complete, 0),
    ):
        setattr(owner, name, full if rank.rank == at else original)
        error = rank.begin(step, seed=step)[1].exception(60)
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC, error
        setattr(owner, name, original)
        dist.barrier(rank.group)
        assert sorted(path.name for path in rank.folder.iterdir()) == ["step-00000003"]
    rank.begin(7, seed=7)[1].result(60)


def killed(rank: Rank) -> None:
    """Rank 1 dies when its weights are written; rank 0 is told."""
    rank.begin(3, seed=3)[1].result(60)
    written = sharded_checkpoint.checksum

    def die(path: Path) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return written(path)

    if rank.rank == 1:
        sharded_checkpoint.checksum = die
    error = rank.begin(9, seed=9)[1].exception(60)
    assert isinstance(error, RuntimeError) and "gloo" in str(error), error
    os._exit(0)  # as PeerLost ends a rank: the others are not waited for


def load_both_forms(rank: Rank) -> None:
    rank.load(rank.folder / "two", seed=7)
    rank.load(rank.folder / "one", seed=1)
    Checkpoints(rank.folder / "four").begin_sharded(8, *map(rank.spread, state(8)), FACTS, rank.group).result(60)


def only_load(rank: Rank) -> None:
    rank.load(rank.folder / "four", seed=8)


def _not_said(message: str) -> None:
    raise AssertionError(message)


def perform(rank: int, store: dist.Store, shape: tuple[int, ...], folder: Path, acts: tuple[Callable, ...]) -> None:
    size = torch.Size(shape).numel()
    dist.init_process_group("gloo", store=store, timeout=timedelta(seconds=60), world_size=size, rank=rank)
    found = Rank(rank, shape, folder)
    for act in acts:
        act(found)
    dist.destroy_process_group()


def run(shape: tuple[int, ...], folder: Path, *acts: Callable[[Rank], None]) -> list[int]:
    """Every rank of a mesh does all acts; returns the exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    return run_ranks(torch.Size(shape).numel(), perform, shape, folder, acts)
