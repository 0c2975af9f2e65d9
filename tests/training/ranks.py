"""Processes that act as ranks.

A server that has imported torch, and never used it, forks them: a rank starts in a fraction of a second.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.many_ranks", "tests.training.sharded_ranks"])


def run_ranks(size: int, act: Callable[..., None], *arguments) -> list[int]:
    """The exit codes of `act(rank, store, *arguments)` on every rank. Raises AssertionError with what one raised."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _CONTEXT.Process(target=_rank, args=(rank, size, Path(folder), act, arguments)) for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
    assert not errors, errors[0]
    return [process.exitcode for process in ranks]


def _rank(rank: int, size: int, folder: Path, act: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        act(rank, dist.FileStore(str(folder / "store"), size), *arguments)
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
