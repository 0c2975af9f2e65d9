"""What the ranks of test_checkpoint.py do: a state made by hand, spread over a mesh as the trainers do it."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from est_cli.training import sharded_checkpoint
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import Peers, World, join, leave
from tests.training.ranks import run_ranks

FACTS = {"train_s": 1.5, "val_loss": 2.5}


def state(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole weights and moments."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"b.0.mlp": (5, 8), "b.1.mlp": (5, 8), "b.0.norm": (8,)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    moments = {f"moments.{name}": torch.randn(t.shape, generator=draw) for name, t in weights.items()}
    counts = {f"counts.{name}": torch.randint(99, t.shape[:1], generator=draw) for name, t in weights.items()}
    return weights, {**counts, **moments}


def local(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in held.items()}


class Rank:
    """One of the ranks of a mesh."""

    def __init__(self, world: World, folder: Path):
        self.world, self.rank, self.folder = world, world.rank, folder
        self.group = dist.new_group(backend="gloo")

    def spread(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds of whole tensors, as DTensors."""
        return self.world.full({name: self.world.own(tensor) for name, tensor in whole.items()})

    def begin(self, step: int, seed: int):
        held = [self.spread(part) for part in state(seed)]
        return held, sharded_checkpoint.begin(Checkpoints(self.folder), step, *held, FACTS, self.group)

    def load(self, folder: Path, seed: int) -> None:
        """Asserts that the newest checkpoint of `folder` is the state of this seed, each tensor as it is held here."""
        found = Checkpoints(folder).newest(pytest.fail)
        weights, moments = (self.spread(part) for part in state(seed + 1))
        found.load_weights(weights)
        found.load_moments(moments)
        found, expected = local({**weights, **moments}), local(self.spread(state(seed)[0] | state(seed)[1]))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def save_and_go_on(rank: Rank) -> None:
    """Step 3, of a state that changes while it is written; then loaded again."""
    held, saving = rank.begin(3, seed=3)
    for tensor in local(held[0] | held[1]).values():
        tensor.fill_(0)
    path = saving.result(60)
    assert path == (rank.folder / "step-00000003" if rank.rank == 0 else None)
    dist.barrier(rank.group)
    rank.load(rank.folder, seed=3)


def no_room(rank: Rank) -> None:
    """Rank 1's disk is full at step 5, rank 0's at step 6: both ranks get it each time, and step 7 is written."""
    write, complete = sharded_checkpoint._Writer.write_data, Checkpoints.complete

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step, owner, name, original, at in (
        (5, sharded_checkpoint._Writer, "write_data", write, 1),
        (6, Checkpoints, "complete", complete, 0),
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
    four = Checkpoints(rank.folder / "four")
    sharded_checkpoint.begin(four, 8, *map(rank.spread, state(8)), FACTS, rank.group).result(60)


def only_load(rank: Rank) -> None:
    rank.load(rank.folder / "four", seed=8)


def perform(rank: int, store: dist.Store, size: int, shards: int, folder: Path, acts: tuple[Callable, ...]) -> None:
    found = Rank(join("cpu", Peers(rank, size, store), 60, shards), folder)
    for act in acts:
        act(found)
    leave()


def run(shape: tuple[int, int], folder: Path, *acts: Callable[[Rank], None]) -> list[int]:
    """Every rank of a mesh of (replicas, shards) does all acts; returns the exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    size = shape[0] * shape[1]
    return run_ranks(size, perform, size, shape[1], folder, acts)
