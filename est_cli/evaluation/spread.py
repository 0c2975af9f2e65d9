"""The loss of sampled subnetworks: how it spreads over plans of the same rates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from est_cli.config import SamplingConfig
from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.training.subnetwork import PackedSubnetwork

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Spread:
    """Losses of subnetworks of some rates, one a plan."""

    rates: Rates
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.losses))

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 for a single plan."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else 0.0

    @property
    def quantiles(self) -> dict[str, float]:
        return {f"{q:g}": float(np.quantile(self.losses, q)) for q in QUANTILES}


@torch.no_grad()
def mean_loss(module: Transformer, windows: np.ndarray, batch_size: int) -> float:
    """Mean cross-entropy in nats of a model on `windows` [n, T + 1]."""
    device = next(module.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(windows), batch_size):
        batch = torch.from_numpy(windows[start : start + batch_size]).to(device)
        total += module(batch[:, :-1], batch[:, 1:]).double() * len(batch)
    return total.item() / len(windows)


def spread(
    model: Transformer,
    sampling: SamplingConfig,
    rates: Rates,
    windows: np.ndarray,
    batch_size: int,
    plans: int,
    seed: int,
) -> Spread:
    """Losses of `plans` subnetworks as training runs them, rescale included.

    Plan n draws from the same numbers whatever the rates, so that losses of two rates can be compared in pairs.
    """
    every_plan_anew = replace(sampling, resample_every=1)
    stage = Stage(1, 0, plans, rates)
    dtype = next(model.parameters()).dtype
    packed = PackedSubnetwork(model, subnetwork(model.config, sampling, rates), dtype)
    losses = []
    for step in range(plans):
        packed.load(sample(seed, step, stage, model.config, every_plan_anew))
        losses.append(mean_loss(packed.module, windows, batch_size))
    return Spread(rates, tuple(losses))


def partial_rates(stages: Sequence[Stage]) -> list[Rates]:
    """The rates of the stages that sample, each once, in their order."""
    return list(dict.fromkeys(stage.rates for stage in stages if stage.rates != Rates()))
