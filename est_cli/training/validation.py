"""Mean losses over windows of tokens."""

import numpy as np
import torch

from est_cli.model.transformer import Transformer
from est_cli.training.distributed import World
from est_cli.training.subnetwork import PackedSubnetwork


@torch.no_grad()
def validation_loss(whole: PackedSubnetwork, windows: np.ndarray, batch_size: int, world: World) -> float:
    """The mean loss of `whole`, the packed full model or what of it has joined: no rescale. Drops its gradients."""
    if not whole.is_master:
        whole.load_whole()
    return mean_loss(whole.module, windows, batch_size, world)


@torch.no_grad()
def mean_loss(module: Transformer, windows: np.ndarray, batch_size: int, world: World | None = None) -> float:
    """Mean cross-entropy in nats of a model on `windows` [n, T + 1] of token ids. A collective.

    The ranks of `world` share the windows. A rank without one computes too: the others need its part of the model.
    """
    world = world or World(device=next(module.parameters()).device)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for start in range(0, len(windows), batch_size * world.size):
        first = start + world.rank * batch_size
        own = windows[first : first + batch_size]
        batch = torch.from_numpy(own if len(own) else windows[:1]).to(world.device)
        total += module(batch[:, :-1], batch[:, 1:]).double() * len(own)
    world.sum_(total)
    return total.item() / len(windows)
