"""trainer=ddp without torchrun: starts one process per device itself and passes exit codes through."""

import os
import signal
import socket
import subprocess
import sys
import time

from est_cli.commands.stopping import STOP_SIGNALS

_POLL_S = 0.1
_GRACE_S = 30.0


def start_processes(count: int, arguments: list[str]) -> int:
    """Run this command in `count` ranks; returns rank 0's exit code, or the first failure's.

    A rank that fails ends all; a signal that asks for a stop is passed on.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    shared.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "est_cli", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(count)
    ]
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: [rank.send_signal(received) for rank in ranks])
    return _wait(ranks)


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Wait for all; after the first failure the others get a grace period, then are killed."""
    failure, deadline = 0, None
    while any(rank.poll() is None for rank in ranks):
        failed = [rank.returncode for rank in ranks if rank.returncode not in (None, 0)]
        if failed and deadline is None:
            failure, deadline = failed[0], time.monotonic() + _GRACE_S
            for rank in ranks:
                if rank.poll() is None and failure != 75:
                    rank.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(_POLL_S)
    return ranks[0].returncode or failure or next((r.returncode for r in ranks if r.returncode), 0)
