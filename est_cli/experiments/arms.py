"""A composed config as est-train trains it; and the arms of a comparison, `+arm=NAME`, which change it last.

An arm is a way to train one config. Arms differ only in how they spend FLOPs.
"""

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from est_cli import training
from est_cli.config import TrainConfig, auto, read_train_config
from est_cli.errors import UserError, nearest
from est_cli.runs.cooldown import Trunk, take_trunk
from est_cli.subnet.flops import config_ledger, training_flops
from est_cli.subnet.sampler import check_strategy
from est_cli.subnet.schedule import StageSpec, boundary_step

EST, FULL, FULL_SAME_FLOPS, SMALL = "est", "full", "full_same_flops", "small"
DENSE = (FULL, FULL_SAME_FLOPS, SMALL)
"""Arms that train one model from the first step to the last; every other arm evolves."""


def read_config(composed: dict[str, Any], hydra_node: DictConfig) -> tuple[TrainConfig, list[str], Trunk | None]:
    """The config to train on this machine, notes on what was chosen, and a cooldown's trunk. Raises UserError."""
    arm, flops = composed.pop("arm", None), composed.pop("arm_flops", None)
    trunk = take_trunk(composed)
    config = read_train_config(composed)
    if config.model.init_from is not None:
        training.pretrained.check_pretrained(config.model)
    config, notes = auto.choose(config, training.device.available_device(config.trainer, config.kernels))
    check_strategy(config)
    if arm is not None:
        config = with_arm(config, arm, flops, hydra_node.runtime.choices.get("scheduler"))
    return config, notes, trunk


def with_arm(config: TrainConfig, arm: str, flops: int | None = None, scheduler: str | None = None) -> TrainConfig:
    """`config`, which holds numbers and no `auto`, as one arm trains it. Raises UserError for an unknown arm.

    est: the config as it is; so is an arm with the name of `scheduler`, the option that the config was composed with.
    full: the full model for the same tokens.
    full_same_flops: the full model for `flops`, LM head included, with a learning-rate schedule of that length.
    small: a model with fewer layers that costs about `flops` for the same tokens.
    `flops` defaults to what `config` spends.
    """
    if arm not in (EST, *DENSE, scheduler):
        raise UserError(
            f"arm={arm}: must be one of {', '.join((EST, *DENSE))}, or the chosen scheduler"
            f"{f' ({scheduler})' if scheduler else ''}{nearest(str(arm), (EST, *DENSE))}"
        )
    if arm not in DENSE:
        return replace(config, name=arm)
    full = replace(config, name=arm, scheduler=replace(config.scheduler, stages=(StageSpec(),)))
    if arm == FULL:
        return full
    flops = spent(config) if flops is None else flops
    if arm == SMALL:
        return _with_fewer_layers(full, flops)
    return _shortened(full, max(1, round(flops / config_ledger(config).full.total)))


def spent(config: TrainConfig) -> int:
    """FLOPs of the whole run, LM head included."""
    return config_ledger(config).spent(config.trainer.max_steps).total


def _with_fewer_layers(config: TrainConfig, flops: int) -> TrainConfig:
    """The number of layers that costs closest to `flops`, at least one fewer than `config` has."""
    model, per_step = config.model, flops / config.trainer.max_steps
    if model.n_layers == 1:
        raise UserError("arm=small: model.n_layers=1 leaves no smaller model")
    if model.init_from is not None:
        raise UserError("arm=small: cannot start from model.init_from, whose model has more layers")

    def distance(n_layers: int) -> float:
        cost = training_flops(replace(model, n_layers=n_layers), config.data.seq_len, config.tokens_per_step)
        return abs(cost.total - per_step)

    return replace(config, model=replace(model, n_layers=min(range(1, model.n_layers), key=distance)))


def _shortened(config: TrainConfig, max_steps: int) -> TrainConfig:
    """A run of `max_steps` in which warmup and decay take the same shares. Those given as a float already do."""

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
