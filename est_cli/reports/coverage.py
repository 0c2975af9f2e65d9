"""How often every layer, head and neuron block was trained, recomputed from the config by the sampler.

Plans are pure functions of the seed and the step, so no run has to record them. A long run has too many plans to draw
all of them again: then an even selection of each stage's plans stands for the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from est_cli.config import ModelConfig, SamplingConfig
from est_cli.reports.records import RunRecord
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.subnet.strategies import STRATEGIES

MAX_PLANS_PER_STAGE = 2000
# Together about a second: a draw costs some 20 microseconds, ranking a unit some 100 nanoseconds.
_MAX_DRAWS = 30_000
_MAX_RANKED_NEURONS = 4_000_000
_MAX_BLOCKS = 64


@dataclass(frozen=True)
class Coverage:
    """Shares of the optimizer steps so far in which a unit was trained, each in [0, 1]."""

    run: RunRecord
    layers: np.ndarray
    """[n_layers]"""
    heads: np.ndarray
    """[n_layers, n_heads], query heads"""
    blocks: np.ndarray
    """[n_layers, blocks of neighbouring neurons], the mean over the block's neurons"""
    neurons_per_block: int
    """In the largest block."""
    plans_drawn: int
    """For layers and heads; neurons of wide models are counted on fewer plans."""
    plans_in_run: int
    noise: float
    """Standard error of a head's share because only some plans are drawn."""

    @property
    def thinned(self) -> bool:
        return self.plans_drawn < self.plans_in_run


def coverage(run: RunRecord) -> Coverage | str:
    """The coverage of a run up to its last logged step, or in words why it is not known."""
    if not run.steps_done:
        return "no step is logged yet"
    if not run.stages:
        return "its stages are not known"
    try:
        # The scale of what is kept does not matter here.
        chosen = {key: value for key, value in run.config["sampling"].items() if key != "rescale"}
        model, sampling = _read(ModelConfig, run.config["model"]), _read(SamplingConfig, chosen)
        seed = int(run.config["seed"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return "its config.yaml does not tell the model and the sampling"
    for strategy in {sampling.strategy, sampling.strategy_of_layers} - STRATEGIES.keys():
        # A report must not run code that a data file names.
        return f"its strategy {strategy} is your own code, which a report does not run"
    return _count(run, model, sampling, seed)


def _read(kind: type, values: Mapping[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


@dataclass
class _Tally:
    """Steps that trained each unit, estimated from the drawn plans."""

    layers: np.ndarray
    heads: np.ndarray
    neurons: np.ndarray
    plans_drawn: int = 0
    plans_in_run: int = 0
    variance: float = 0.0
    """Of one head's count."""


def _count(run: RunRecord, model: ModelConfig, sampling: SamplingConfig, seed: int) -> Coverage:
    n_stages = sum(stage.first_step < run.steps_done for stage in run.stages)
    ranked = model.n_layers * (model.d_ff // sampling.mlp_block) * n_stages
    most = min(MAX_PLANS_PER_STAGE, _MAX_DRAWS // (2 * model.n_layers * n_stages))
    few = max(20, min(most, _MAX_RANKED_NEURONS // ranked))
    tally = by_neuron = _tally(run, model, sampling, seed, few)
    if few < most and tally.plans_drawn < tally.plans_in_run:
        # Draws of heads and layers do not depend on the MLP's width, and without it many more are cheap.
        tally = _tally(run, replace(model, d_ff=sampling.mlp_block), sampling, seed, most)
    n_sampled_together = model.d_ff // sampling.mlp_block
    n_blocks = min(_MAX_BLOCKS, n_sampled_together)
    edges = (np.arange(n_blocks) * n_sampled_together // n_blocks) * sampling.mlp_block
    sizes = np.diff(np.append(edges, model.d_ff))
    done = float(run.steps_done)
    return Coverage(
        run,
        tally.layers / done,
        tally.heads / done,
        np.add.reduceat(by_neuron.neurons, edges, axis=1) / sizes / done,
        int(sizes.max()),
        tally.plans_drawn,
        tally.plans_in_run,
        float(np.sqrt(tally.variance)) / done,
    )


def _tally(run: RunRecord, model: ModelConfig, sampling: SamplingConfig, seed: int, max_plans: int) -> _Tally:
    n = model.n_layers
    tally = _Tally(np.zeros(n), np.zeros((n, model.n_heads)), np.zeros((n, model.d_ff)))
    for stage in run.stages:
        if stage.first_step >= run.steps_done:
            break
        steps, weights, n_plans = _chosen_steps(stage, run.steps_done, sampling.resample_every, max_plans)
        tally.plans_drawn += len(steps)
        tally.plans_in_run += n_plans
        kept = stage.rates.heads * stage.rates.layers
        tally.variance += kept * (1 - kept) * weights.sum() ** 2 * (1 / len(steps) - 1 / n_plans)
        for step, weight in zip(steps.tolist(), weights.tolist(), strict=True):
            plan = sample(seed, step, stage, model, sampling)
            tally.layers[plan.layers] += weight
            tally.heads[plan.layers[:, None], plan.heads] += weight
            tally.neurons[plan.layers[:, None], plan.neurons] += weight
    return tally


def _chosen_steps(stage: Stage, steps_done: int, every: int, max_plans: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Steps whose plans are drawn, how many steps each stands for, and how many plans the stage had."""
    end = min(stage.end, steps_done)
    first_of_plan = np.arange(stage.first_step, end, every)
    n_plans = len(first_of_plan)
    if stage.rates == Rates():
        return first_of_plan[:1], np.array([float(end - stage.first_step)]), 1
    if n_plans <= max_plans:
        return first_of_plan, np.diff(np.append(first_of_plan, end)).astype(float), n_plans
    chosen = np.linspace(0, n_plans - 1, max_plans).round().astype(int)
    return first_of_plan[chosen], np.full(max_plans, (end - stage.first_step) / max_plans), n_plans
