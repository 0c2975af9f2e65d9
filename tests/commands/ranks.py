"""sampling.strategy=tests.commands.ranks.acting: samples as `random` does, and at one step does what ACT says, once.

ACT is `WHAT:RANK`, or `WHAT:RANK:STEP` for another step than 5. Rank 0 or 1 raises, is killed, is lost with its
launcher as a machine is, stops its launcher (the run itself where it is alone), or stops itself while checkpoints take
SLOW_S seconds to write, and every rank leaves `ended-RANK` when it ends; or hangs; or is killed when it has written its
part of the next checkpoint. Ranks that torchrun has started again only sample.
"""

import atexit
import functools
import os
import signal
import time
from pathlib import Path

import numpy as np

from est_cli.subnet.strategies import Draw, random
from est_cli.training import sharded_checkpoint
from est_cli.training.checkpoint import Checkpoints

SLOW_S, HANG_S = float(os.environ.get("SLOW_S", 2)), 15.0
WHAT, RANK, STEP, *_ = *os.environ.get("ACT", "nothing:-1").split(":"), "5"
"""Step 5 is of stage 2, which begins with step 2."""


def acting(draw: Draw, total: int, kept: int) -> np.ndarray:
    here = (str(draw.stage_start + draw.number), os.environ.get("RANK", "0"))
    if here == (STEP, RANK) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        _act()
    return random(draw, total, kept)


@functools.cache
def _act() -> None:
    """Cached, as a step draws many times."""
    if WHAT == "raise":
        raise RuntimeError(f"rank {RANK} breaks")
    if WHAT == "hang":
        time.sleep(HANG_S)
    elif WHAT == "die-writing":
        sharded_checkpoint.checksum = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    elif WHAT == "stop-itself":
        os.kill(os.getpid(), signal.SIGTERM)
    elif WHAT == "power-off":
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        target = os.getppid() if "WORLD_SIZE" in os.environ and WHAT != "SIGKILL" else os.getpid()
        os.kill(target, getattr(signal, WHAT))


def _complete_slowly(checkpoints: Checkpoints, *arguments):
    time.sleep(SLOW_S)
    return _complete(checkpoints, *arguments)


_complete = Checkpoints.complete
if WHAT in ("stop-itself", "hang"):
    Checkpoints.complete = _complete_slowly
    atexit.register(lambda: Path(f"ended-{os.environ['RANK']}").touch())
