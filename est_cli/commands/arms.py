"""The arms of a comparison, `+arm=NAME`: one config, trained in three ways that differ in nothing else."""

from dataclasses import replace

from est_cli.config import TrainConfig
from est_cli.errors import UserError, nearest
from est_cli.subnet.flops import config_ledger
from est_cli.subnet.schedule import StageSpec, boundary_step

EST, FULL, FULL_SAME_FLOPS = ARMS = ("est", "full", "full_same_flops")


def with_arm(config: TrainConfig, arm: str) -> TrainConfig:
    """`config` (with numbers, no `auto`) as one arm trains it. Raises UserError for an arm that there is not.

    est: as it stands. full: the full model for the same tokens. full_same_flops: the full model for the FLOPs, LM
    head included, that est spends, with the learning-rate schedule of a run of that length.
    """
    if arm not in ARMS:
        raise UserError(f"arm={arm}: must be one of {', '.join(ARMS)}{nearest(str(arm), ARMS)}")
    if arm == EST:
        return replace(config, name=arm)
    steps = config.trainer.max_steps
    full = replace(config, name=arm, scheduler=replace(config.scheduler, stages=(StageSpec(),)))
    if arm == FULL:
        return full
    ledger = config_ledger(config)
    return _shortened(full, max(1, round(ledger.spent(steps).total / ledger.full.total)))


def _shortened(config: TrainConfig, max_steps: int) -> TrainConfig:
    """A run of `max_steps` whose warmup and decay take the same shares of it; a share (float) does so by itself."""

    def scaled(steps: int | float | None) -> int | float | None:
        return round(steps * max_steps / config.trainer.max_steps) if isinstance(steps, int) else steps

    optimizer = config.optimizer
    decay_steps = scaled(optimizer.decay_steps)
    if isinstance(decay_steps, int):
        decay_steps = max(1, decay_steps)
    optimizer = replace(optimizer, warmup=scaled(optimizer.warmup), decay_steps=decay_steps)
    start = optimizer.decay_start(max_steps)
    if optimizer.decay == "wsd" and boundary_step(optimizer.warmup, max_steps) > start:
        # Each was rounded up: in the long run they touched, here they would overlap.
        optimizer = replace(optimizer, warmup=start)
    return replace(config, optimizer=optimizer, trainer=replace(config.trainer, max_steps=max_steps))
