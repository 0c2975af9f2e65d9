"""What a run costs before it is trained: minutes of one idle core."""

import numpy as np

from est_cli.subnet.flops import config_ledger
from study.grid import Run
from study.training import config_of

_GFLOP, _STEP_MS = (0.554, 0.906, 1.611), (19.0, 30.0, 39.0)
"""Of a step in stages 1, 2 and 3 of the base config, measured on one idle core; other sizes lie between them."""
_EVALUATION_MS = 3400.0


def minutes(run: Run) -> float:
    """About so many minutes of one core."""
    config = config_of(run)
    ledger = config_ledger(config)
    milliseconds = sum(
        stage.steps * float(np.interp(cost.total / 1e9, _GFLOP, _STEP_MS))
        for stage, cost in zip(ledger.stages, ledger.per_step, strict=True)
    )
    evaluations = config.trainer.max_steps / config.trainer.eval_every
    return (milliseconds + evaluations * _EVALUATION_MS) / 60_000
