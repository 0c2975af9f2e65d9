"""sampling.strategy=tests.commands.ranks.acting: samples as `random` does, and at step 5 does what ACT says.

ACT is `WHAT:RANK`. Rank 0 or 1 raises, is killed, is lost with its launcher as a machine is, stops its launcher (the
run itself where it is alone), or stops itself while checkpoints take SLOW_S seconds to write, and every rank leaves
`ended-RANK` when it ends; or hangs; or is killed when it has written its part of the next checkpoint. Ranks that
torchrun has started again only sample.
"""

import atexit
import os
import signal
import time
from pathlib import Path

import numpy as np

from est_cli.subnet.strategies import Draw, random
from est_cli.training.checkpoint import Checkpoints

STEP = 5
"""Of stage 2, which begins with step 2."""
SLOW_S, HANG_S = float(os.environ.get("SLOW_S", 2)), 15.0


def acting(draw: Draw, total: int, kept: int) -> np.ndarray:
    what, _, rank = os.environ.get("ACT", ":").partition(":")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        what = ""
    if what and (draw.stage_start + draw.number, os.environ.get("RANK", "0")) == (STEP, rank):
        os.environ["ACT"] = ":"  # once: a step draws many times
        if what == "raise":
            raise RuntimeError(f"rank {rank} breaks")
        if what == "power-off":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(HANG_S)
            return random(draw, total, kept)
        if what == "stop-itself":
            os.kill(os.getpid(), signal.SIGTERM)
            return random(draw, total, kept)
        if what == "die-writing":
            from est_cli.training import sharded_checkpoint

            sharded_checkpoint.checksum = lambda path: os.kill(os.getpid(), signal.SIGKILL)
            return random(draw, total, kept)
        target = os.getppid() if "WORLD_SIZE" in os.environ and what != "SIGKILL" else os.getpid()
        os.kill(target, getattr(signal, what))
    return random(draw, total, kept)


def _complete_slowly(checkpoints: Checkpoints, *arguments):
    time.sleep(SLOW_S)
    return _complete(checkpoints, *arguments)


_complete = Checkpoints.complete
if os.environ.get("ACT", "").startswith(("stop-itself", "hang")):
    Checkpoints.complete = _complete_slowly
    atexit.register(lambda: Path(f"ended-{os.environ['RANK']}").touch())
