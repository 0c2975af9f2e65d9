"""A sampled subnetwork as an ordinary smaller model: packed, with its rescales folded into the weights."""

from dataclasses import dataclass

import torch

from est_cli.config import TrainConfig
from est_cli.errors import UserError
from est_cli.model.transformer import Transformer, layer_of
from est_cli.subnet.growth import growth_into
from est_cli.subnet.plan import Plan, Subnetwork, stage_subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage, stage_at
from est_cli.training.subnetwork import PackedSubnetwork


@dataclass(frozen=True)
class Sampled:
    """The shape and the plan of one subnetwork."""

    shape: Subnetwork
    plan: Plan


def sampled_at(config: TrainConfig, step: int, steps_done: int | None = None) -> Sampled:
    """The subnetwork that the run trained in optimizer step `step`.

    Raises UserError where the run has no such step, or where the weights after `steps_done` steps do not hold the
    subnetwork, because a growth lies between.
    """
    if not 0 <= step < config.trainer.max_steps:
        raise UserError(f"plan_step={step}: must be an integer in [0, {config.trainer.max_steps - 1}]")
    stage = stage_at(config.stages, step)
    if steps_done is not None and stage.first_step >= steps_done and (growth := growth_into(config, stage)):
        raise UserError(
            f"plan_step={step}: the newest checkpoint, of {steps_done} steps, is from before step {stage.first_step}, "
            f"where the model {growth}; name an earlier step"
        )
    return _sample(config, step, stage)


def sampled_with(config: TrainConfig, rates: Rates) -> Sampled:
    """A subnetwork of given rates, drawn with the run's seed, granularity and strategy."""
    return _sample(config, 0, Stage(1, 0, 1, rates))


def _sample(config: TrainConfig, step: int, stage: Stage) -> Sampled:
    plan = sample(config.seed, step, stage, config.model, config.sampling)
    return Sampled(stage_subnetwork(config.model, config.sampling, stage), plan)


def packed(model: Transformer, subnet: Sampled) -> Transformer:
    """The subnetwork as training runs it: its rescales are settings of its blocks."""
    pack = PackedSubnetwork(model, subnet.shape, next(model.parameters()).dtype)
    pack.load(subnet.plan)
    return pack.module


@torch.no_grad()
def standalone(module: Transformer, subnet: Sampled) -> Transformer:
    """A model without rescales whose logits are those of the packed `module`.

    A branch's scale multiplies its output projection; what of it is the layer's own also multiplies the bias.
    """
    shape, scales = subnet.shape, subnet.plan.scales
    dtype = next(module.parameters()).dtype
    model = Transformer(shape.model, dtype=dtype)
    branches = {"attention.out": (0, shape.head_scale), "mlp.down": (1, shape.mlp_scale)}
    sources = dict(module.named_parameters())
    for name, parameter in model.named_parameters():
        branch, _, leaf = name.split(".", 2)[-1].rpartition(".")
        factor = 1.0
        if branch in branches:
            column, unit = branches[branch]
            factor = float(scales[layer_of(name), column]) / (1.0 if leaf == "weight" else unit)
        parameter.copy_(sources[name] * factor)
    return model
