"""sampling.strategy=tests.commands.ranks.acting: samples as `random` does, and at step 5 does what ACT says.

ACT is `WHAT:RANK`. Rank 0 or 1 raises, is killed, or stops its launcher (the run itself where it is alone).
"""

import os
import signal

import numpy as np

from est_cli.subnet.strategies import Draw, random

STEP = 5
"""Of stage 2, which begins with step 2."""


def acting(draw: Draw, total: int, kept: int) -> np.ndarray:
    what, _, rank = os.environ.get("ACT", ":").partition(":")
    if (draw.stage_start + draw.number, os.environ.get("RANK", "0")) == (STEP, rank):
        os.environ["ACT"] = ":"  # once: a step draws many times
        if what == "raise":
            raise RuntimeError(f"rank {rank} breaks")
        target = os.getppid() if "WORLD_SIZE" in os.environ and what != "SIGKILL" else os.getpid()
        os.kill(target, getattr(signal, what))
    return random(draw, total, kept)
