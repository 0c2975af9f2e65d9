"""Matrix-multiplication FLOPs of training, 2 per multiply-add.

Backward costs twice the forward pass (each product has two gradients). Attention scores are counted in full, not
halved for causality. The LM head is included; recomputation and the optimizer are not. The formula is that of a dense
model: a subnetwork costs what its small model costs.
"""

from dataclasses import dataclass, replace

from est_cli.config import ModelConfig, TrainConfig
from est_cli.errors import UserError
from est_cli.subnet.memory import count_parameters
from est_cli.subnet.plan import stage_subnetworks
from est_cli.subnet.schedule import Stage, build_stages, stage_at


@dataclass(frozen=True)
class Flops:
    """FLOPs of the transformer blocks and of the LM head."""

    blocks: int
    head: int

    @property
    def total(self) -> int:
        return self.blocks + self.head


def training_flops(model: ModelConfig, seq_len: int, tokens: int) -> Flops:
    """Forward and backward of `tokens` tokens in sequences of `seq_len`."""
    scores = 2 * seq_len * model.n_heads * model.head_dim  # queries with keys, and weights with values
    forward_and_backward = 3 * 2 * tokens
    return Flops(
        blocks=forward_and_backward * (count_parameters(model).block_matrices + model.n_layers * scores),
        head=forward_and_backward * model.d_model * model.vocab_size,
    )


@dataclass(frozen=True)
class Ledger:
    """What a run has spent after any step: a pure function of the schedule."""

    stages: tuple[Stage, ...]
    per_step: tuple[Flops, ...]
    """Cost of one optimizer step in each stage."""
    full: Flops
    """Cost of one optimizer step of the full model."""

    def spent(self, steps: int) -> Flops:
        """FLOPs of the first `steps` optimizer steps."""
        done = [max(0, min(steps, stage.end) - stage.first_step) for stage in self.stages]
        costs = list(zip(done, self.per_step, strict=True))
        return Flops(sum(n * cost.blocks for n, cost in costs), sum(n * cost.head for n, cost in costs))

    def saved(self, steps: int) -> float:
        """Share of the whole model's FLOPs, LM head included, that `steps` steps did not spend."""
        return 1.0 - self.spent(steps).total / (steps * self.full.total)

    def saved_blocks(self, steps: int) -> float:
        """The same for the transformer blocks only: the paper's accounting."""
        return 1.0 - self.spent(steps).blocks / (steps * self.full.blocks)

    def stage_saved(self, number: int) -> float:
        """Share of the whole model's FLOPs that one step of this stage does not spend."""
        return 1.0 - self.per_step[number - 1].total / self.full.total

    def stage_saved_blocks(self, number: int) -> float:
        """The same for the transformer blocks only."""
        return 1.0 - self.per_step[number - 1].blocks / self.full.blocks

    def record(self, step: int) -> dict[str, float | int]:
        """The `flops/*` metrics of optimizer step `step`."""
        steps = step + 1
        return {
            "flops/step": self.per_step[stage_at(self.stages, step).number - 1].total,
            "flops/total": self.spent(steps).total,
            "flops/full_total": steps * self.full.total,
            "flops/saved": self.saved(steps),
            "flops/saved_blocks": self.saved_blocks(steps),
        }


def config_ledger(config: TrainConfig) -> Ledger:
    """The ledger of a run whose config holds numbers, no `auto`."""
    models = [*(shape.model for shape in stage_subnetworks(config)), config.model]
    *costs, full = (training_flops(model, config.data.seq_len, config.tokens_per_step) for model in models)
    return Ledger(config.stages, tuple(costs), full)


def scale_boundaries(config: TrainConfig, target: float) -> TrainConfig:
    """The config with all boundaries moved by one factor, to fractions of the run at which `saved_blocks` is `target`.

    Raises UserError if no factor reaches the target, or if `max_steps` is too small for the stages.
    """
    if not 0 < target < 1:
        raise UserError(f"target_saved_blocks={target:g}: must be a number in (0, 1)")
    ledger, max_steps = config_ledger(config), config.trainer.max_steps
    fractions = [stage.end / max_steps for stage in ledger.stages[:-1]]
    if not fractions:
        raise UserError(
            f"target_saved_blocks={target:g}: this schedule has no boundaries to move; try scheduler=three_stage"
        )
    # Stage lengths, and so savings, are linear in the common factor, from the last stage only to no last stage.
    none, present = ledger.stage_saved_blocks(len(ledger.stages)), ledger.saved_blocks(max_steps)
    most = ledger.saved_blocks(ledger.stages[-1].first_step)
    factor = (target - none) / (present - none) if present != none else 0.0
    if factor <= 0 or factor * fractions[-1] >= 1:
        raise UserError(
            f"target_saved_blocks={target:g}: these rates and proportions save between "
            f"{min(none, most):.1%} and {max(none, most):.1%}; lower sampling.heads, sampling.mlp or "
            "sampling.layers, or give the stages other proportions"
        )
    *sampled, last = config.scheduler.stages
    ends = [round(factor * fraction, 6) for fraction in fractions]
    stages = (*(replace(spec, end=end) for spec, end in zip(sampled, ends, strict=True)), last)
    build_stages(stages, max_steps, config.scheduler.boundary_keys)
    return replace(config, scheduler=replace(config.scheduler, stages=stages))
