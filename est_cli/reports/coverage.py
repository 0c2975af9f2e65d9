"""How often every layer, head and neuron block was trained, recomputed from the config by the sampler.

Plans are pure functions of the seed and the step, so no run has to record them. A long run has too many plans to draw
all of them again: then an even selection of each stage's plans stands for the rest.
"""

from dataclasses import dataclass, replace

import numpy as np

from est_cli.config import ModelConfig, SamplingConfig
from est_cli.reports.records import RunRecord, evenly, of_known_keys
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
        model, sampling = of_known_keys(ModelConfig, run.config["model"]), of_known_keys(SamplingConfig, chosen)
        seed = int(run.config["seed"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return "its config.yaml does not tell the model and the sampling"
    for strategy in {sampling.strategy, sampling.strategy_of_layers} - STRATEGIES.keys():
        # A report must not run code that a data file names.
        return f"its strategy {strategy} is your own code, which a report does not run"
    return _count(run, model, sampling, seed)


def _count(run: RunRecord, model: ModelConfig, sampling: SamplingConfig, seed: int) -> Coverage:
    stages = [stage for stage in run.stages if stage.first_step < run.steps_done]
    n, n_mlp_units = model.n_layers, model.d_ff // sampling.mlp_block
    max_plans = min(MAX_PLANS_PER_STAGE, _MAX_DRAWS // (2 * n * len(stages)))
    max_ranked = max(20, _MAX_RANKED_NEURONS // (n * n_mlp_units * len(stages)))
    # Draws of heads and layers do not depend on the MLP's width, and without it many more are cheap.
    narrow = replace(model, d_ff=sampling.mlp_block)
    layers, heads, neurons = np.zeros(n), np.zeros((n, model.n_heads)), np.zeros((n, model.d_ff))
    plans_drawn, plans_in_run, variance = 0, 0, 0.0
    for stage in stages:
        steps, weight, n_plans = _chosen_plans(stage, run.steps_done, sampling.resample_every, max_plans)
        ranked = set(evenly(len(steps), max_ranked).tolist())
        for index, step in enumerate(steps.tolist()):
            plan = sample(seed, step, stage, model if index in ranked else narrow, sampling)
            layers[plan.layers] += weight[index]
            heads[plan.layers[:, None], plan.heads] += weight[index]
            if index in ranked:
                neurons[plan.layers[:, None], plan.neurons] += weight[index] * len(steps) / len(ranked)
        plans_drawn, plans_in_run = plans_drawn + len(steps), plans_in_run + n_plans
        kept = stage.rates.heads * stage.rates.layers
        variance += kept * (1 - kept) * weight.sum() ** 2 * (1 / len(steps) - 1 / n_plans)
    n_blocks = min(_MAX_BLOCKS, n_mlp_units)
    edges = (np.arange(n_blocks) * n_mlp_units // n_blocks) * sampling.mlp_block
    sizes = np.diff(np.append(edges, model.d_ff))
    blocks = np.add.reduceat(neurons, edges, axis=1) / sizes
    done, noise = run.steps_done, float(np.sqrt(variance))
    shares = (counts / done for counts in (layers, heads, blocks))
    return Coverage(run, *shares, int(sizes.max()), plans_drawn, plans_in_run, noise / done)


def _chosen_plans(stage: Stage, steps_done: int, every: int, max_plans: int) -> tuple[np.ndarray, np.ndarray, int]:
    """First steps of the plans that are drawn, how many steps each stands for, and how many plans the stage had."""
    end = min(stage.end, steps_done)
    all_plans_are_equal = stage.rates == Rates()
    first_steps = np.arange(stage.first_step, end, end - stage.first_step if all_plans_are_equal else every)
    if len(first_steps) <= max_plans:
        return first_steps, np.diff(np.append(first_steps, end)), len(first_steps)
    weights = np.full(max_plans, (end - stage.first_step) / max_plans)
    return first_steps[evenly(len(first_steps), max_plans)], weights, len(first_steps)
