"""Validation loss: always the full model, or the part of it that has joined, with no rescale."""

import numpy as np
import torch

from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import Subnetwork
from est_cli.training.distributed import World
from est_cli.training.subnetwork import PackedSubnetwork


@torch.no_grad()
def validation_loss(
    model: Transformer,
    windows: np.ndarray,
    batch_size: int,
    dtype: torch.dtype,
    world: World,
    whole: PackedSubnetwork | None = None,
) -> float:
    """Mean cross-entropy in nats of the full model, in the run's precision.

    windows [n, T + 1] of token ids; ranks share the windows. `whole` is a packed copy of the model, or of what has
    joined, to use instead; its gradients are dropped.
    """
    subnetwork = whole or PackedSubnetwork(model, Subnetwork(model.config), dtype)
    if not subnetwork.is_master:
        subnetwork.load_whole()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for start in range(world.rank * batch_size, len(windows), batch_size * world.size):
        batch = torch.from_numpy(windows[start : start + batch_size]).to(world.device)
        total += subnetwork.module(batch[:, :-1], batch[:, 1:]).double() * len(batch)
    world.sum_([total])
    return total.item() / len(windows)
