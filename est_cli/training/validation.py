"""Validation loss: always the full model, or the part of it that has joined, with no rescale."""

import numpy as np
import torch

from est_cli.training.distributed import World
from est_cli.training.subnetwork import PackedSubnetwork


@torch.no_grad()
def validation_loss(whole: PackedSubnetwork, windows: np.ndarray, batch_size: int, world: World) -> float:
    """Mean cross-entropy in nats of `whole`, the packed full model or what of it has joined; drops its gradients.

    windows [n, T + 1] of token ids; ranks share the windows, and a rank without one computes along: its part of the
    model is needed.
    """
    if not whole.is_master:
        whole.load_whole()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for start in range(0, len(windows), batch_size * world.size):
        first = start + world.rank * batch_size
        own = windows[first : first + batch_size]
        batch = torch.from_numpy(own if len(own) else windows[:1]).to(world.device)
        total += whole.module(batch[:, :-1], batch[:, 1:]).double() * len(own)
    world.sum_(total)
    return total.item() / len(windows)
