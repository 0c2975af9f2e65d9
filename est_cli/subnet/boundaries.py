"""Boundaries that reach a saving: the schedule's own, all moved by one factor."""

from dataclasses import replace

from est_cli.config import TrainConfig
from est_cli.errors import UserError
from est_cli.subnet.flops import Ledger, config_ledger
from est_cli.subnet.schedule import boundary_step, build_stages


def scale_boundaries(config: TrainConfig, target: float) -> dict[str, float]:
    """Fractions of the run, by config key, at which `saved_blocks` is `target`.

    The proportions of the boundaries stay. Raises UserError where no boundaries reach the target.
    """
    specs, names, max_steps = config.scheduler.stages, config.scheduler.names, config.trainer.max_steps
    if not 0 < target < 1:
        raise UserError(f"target_saved_blocks={target:g}: must be a number in (0, 1)")
    ledger = config_ledger(config)
    fractions = [boundary_step(spec.end, max_steps) / max_steps for spec in specs[:-1]]
    if not fractions:
        raise UserError(
            f"target_saved_blocks={target:g}: this schedule has no boundaries to move; try scheduler=three_stage"
        )
    none, present = _saved(ledger, [0.0] * len(fractions)), _saved(ledger, fractions)
    most = _saved(ledger, [f / fractions[-1] for f in fractions])
    # Savings are linear in the common factor: stage lengths are.
    factor = (target - none) / (present - none) if present != none else 0.0
    if factor <= 0 or factor * fractions[-1] >= 1:
        raise UserError(
            f"target_saved_blocks={target:g}: these rates and proportions save between "
            f"{min(none, most):.1%} and {max(none, most):.1%}; lower sampling.heads, sampling.mlp or "
            "sampling.layers, or give the stages other proportions"
        )
    return {name: round(factor * fraction, 6) for name, fraction in zip(names, fractions, strict=False)}


def with_boundaries(config: TrainConfig, boundaries: dict[str, float]) -> TrainConfig:
    """The config with these boundaries; raises UserError where `max_steps` is too small for them."""
    *sampled, last = config.scheduler.stages
    stages = (*(replace(spec, end=end) for spec, end in zip(sampled, boundaries.values(), strict=True)), last)
    try:
        build_stages(stages, config.trainer.max_steps, config.scheduler.names)
    except ValueError as error:
        raise UserError(str(error)) from error
    return replace(config, scheduler=replace(config.scheduler, stages=stages))


def _saved(ledger: Ledger, fractions: list[float]) -> float:
    """saved_blocks of stages that end at these fractions of the run."""
    starts, ends = [0.0, *fractions], [*fractions, 1.0]
    spent = sum((end - start) * cost.blocks for start, end, cost in zip(starts, ends, ledger.per_step, strict=True))
    return 1.0 - spent / ledger.full.blocks
