"""Loss, perplexity and bits per byte of the full model, and the losses of sampled subnetworks."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from est_cli.config import SamplingConfig
from est_cli.data.batches import validation_windows
from est_cli.errors import UserError
from est_cli.evaluation.run import OpenRun
from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import Subnetwork, subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.training.distributed import World
from est_cli.training.subnetwork import DTYPES, PackedSubnetwork
from est_cli.training.validation import mean_loss, validation_loss

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def evaluate(
    run: OpenRun, tokens: np.ndarray, token_bytes: np.ndarray, n_tokens: int, seq_len: int | None = None
) -> dict[str, float]:
    """`val_loss` in nats per token, `perplexity`, `bits_per_byte` of UTF-8, and the number of `tokens` predicted.

    Evaluates as the run itself does: with its batch size and precision, and its sequence length by default.
    tokens [n] of the validation split; token_bytes [V]; n_tokens is how many of them to predict. Raises UserError
    if there are too few.
    """
    config = run.config
    seq_len = seq_len or config.data.seq_len
    if len(tokens) <= seq_len:
        raise UserError(
            f"data.seq_len={seq_len}: the validation split has {len(tokens)} tokens, and needs {seq_len + 1}; use more "
            "text, a larger data.val_fraction, or a smaller data.seq_len"
        )
    windows = validation_windows(tokens, seq_len, n_tokens)
    world = World(device=next(run.model.parameters()).device)
    whole = PackedSubnetwork(run.model, Subnetwork(run.model.config), DTYPES[config.trainer.precision])
    loss, targets = validation_loss(whole, windows, config.trainer.batch_size, world), windows[:, 1:]
    bits_per_byte = loss * targets.size / round(token_bytes[targets].sum()) / math.log(2)
    return {"val_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte, "tokens": targets.size}


def spread(
    model: Transformer,
    sampling: SamplingConfig,
    rates: Rates,
    windows: np.ndarray,
    batch_size: int,
    plans: int,
    seed: int,
) -> dict[str, Any]:
    """Losses of `plans` subnetworks as training runs them, rescale included, with their mean, std and quantiles.

    Plan n uses the same random numbers for all rates, so that losses of two rates can be compared in pairs.
    """
    sampling = replace(sampling, resample_every=1)
    stage = Stage(1, 0, plans, rates)
    packed = PackedSubnetwork(model, subnetwork(model.config, sampling, rates), next(model.parameters()).dtype)
    losses = []
    for step in range(plans):
        packed.load(sample(seed, step, stage, model.config, sampling))
        losses.append(mean_loss(packed.module, windows, batch_size))
    quantiles = {f"{q:g}": float(np.quantile(losses, q)) for q in QUANTILES}
    return {"rates": asdict(rates), **mean_and_std(losses), "quantiles": quantiles, "losses": losses}


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """`std` is the sample standard deviation, 0 for a single value."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def partial_rates(stages: Sequence[Stage]) -> list[Rates]:
    """The rates of the stages that sample, each once, in order."""
    return list(dict.fromkeys(stage.rates for stage in stages if stage.rates != Rates()))
