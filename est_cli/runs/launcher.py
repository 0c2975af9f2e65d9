"""trainer=ddp, fsdp or hsdp without torchrun: torch elastic starts one process per device; one exit code comes back.

Its `start_processes` starts, watches and ends the ranks, as it does for torchrun. The agent above it (`elastic_launch`)
is left out: after a signal it does not tell how the ranks ended, and 75 must mean that a checkpoint was written.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

import est_cli
from est_cli.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, STOPPED, say
from est_cli.runs.stopping import STOP_SIGNALS, handlers_restored

_POLL_S = 0.1


def launch(count: int, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run `python *command` in `count` ranks, and return the exit code of the run.

    If one rank fails, the others are stopped. A signal that asks for a stop is passed on.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for module in ("api", "subprocess_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{module}").setLevel(logging.CRITICAL)
    # The ranks meet here, as in torchrun's agent: no port to lose to others, and no rank that others depend on.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **(environment or {}),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        # Keeps the current folder, whose files could shadow libraries, off the ranks' path, unless est_cli lies there.
        "PYTHONSAFEPATH": "" if Path(est_cli.__file__).parents[1] == Path.cwd() else "1",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in ranks.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    with handlers_restored():  # torch sets handlers too
        ranks = start_processes(
            "est-train",
            sys.executable,
            dict.fromkeys(range(count), tuple(command)),
            {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)},
            DefaultLogsSpecs(os.devnull),
        )
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, pass_on)
            failures = ranks.wait(period=_POLL_S).failures
        finally:
            ranks.close()
    if failures and (cause := next(iter(failures.values()))).exitcode < 0:
        say(f"rank {cause.local_rank} was ended by {signal.Signals(-cause.exitcode).name}")
    return _exit_code([failures[rank].exitcode if rank in failures else DONE for rank in range(count)])


def _exit_code(codes: Sequence[int]) -> int:
    """The exit code of the run: that of the rank that ended it, not of ranks that were stopped because of it."""
    for code in (BAD_INPUT, INTERRUPTED):
        if code in codes:
            return code
    if STOPPED in codes:
        # Ranks that stop do so together, and SIGTERM may meet the last of them while Python shuts down.
        codes = [code for code in codes if code != -signal.SIGTERM]
    if set(codes) <= {DONE, STOPPED}:
        return max(codes)
    return FAILED
