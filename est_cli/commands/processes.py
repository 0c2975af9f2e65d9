"""trainer=ddp without torchrun: starts one process per device itself and passes exit codes through."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from est_cli.commands import entry
from est_cli.commands.stopping import STOP_SIGNALS

_POLL_S = 0.1
_GRACE_S = 20.0
"""From a failure to the end of those that did not notice it."""


def start_processes(count: int, command: Sequence[str]) -> int:
    """Run `python *command` in `count` ranks, and return their exit code.

    A rank that fails ends all; a signal that asks for a stop is passed on.
    """
    import torch.distributed as dist

    # The ranks meet here, as under torchrun's agent: no port to be lost to others, and no rank that others depend on.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, (os.cpu_count() or 1) // count)
    shared = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            # Ctrl-C of a terminal goes to the whole session: they get it from here, once.
            start_new_session=True,
        )
        for rank in range(count)
    ]
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: [rank.send_signal(received) for rank in ranks])
    return _wait(ranks)


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    """Wait for all. After a failure the others are asked to end, and then made to."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        time.sleep(_POLL_S)
        if deadline is None and any(map(_has_failed, ranks)):
            deadline = time.monotonic() + _GRACE_S
            _say_who_was_killed(ranks)
            for rank in ranks:
                rank.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
    if deadline is None:
        _say_who_was_killed(ranks)
    return _exit_code([rank.returncode for rank in ranks])


def _has_failed(rank: subprocess.Popen) -> bool:
    """A rank that is done, or has stopped, may be so before rank 0, which still writes."""
    return rank.poll() not in (None, entry.DONE, entry.STOPPED)


def _say_who_was_killed(ranks: Sequence[subprocess.Popen]) -> None:
    for number, rank in enumerate(ranks):
        if rank.returncode is not None and rank.returncode < 0:
            name = signal.Signals(-rank.returncode).name
            entry.say(f"rank {number} was ended by {name}")


def _exit_code(codes: Sequence[int]) -> int:
    """Of the run: what ended it, not what became of those that it took along."""
    for code in (entry.BAD_INPUT, entry.INTERRUPTED):
        if code in codes:
            return code
    if set(codes) <= {entry.DONE, entry.STOPPED}:
        return max(codes)
    return entry.FAILED
