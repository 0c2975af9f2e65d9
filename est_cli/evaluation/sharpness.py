"""How sharp the loss is around the weights: the Hessian's largest eigenvalue, and the rise under random noise.

P parameters, as one vector
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from est_cli.evaluation.loss import mean_and_std
from est_cli.model.transformer import Transformer

_TOKENS_AT_ONCE = 2048
"""In a second backward pass, which needs about three times the memory of training, and all attention scores."""
_TOLERANCE = 1e-3
"""Relative change of the eigenvalue in one iteration below which it counts as settled."""

Product = Callable[[Tensor], Tensor]
"""v [P] → H v [P]"""


def hessian_product(model: Transformer, windows: np.ndarray) -> Product:
    """Products with the Hessian of the mean cross-entropy on `windows` [n, T + 1], by a second backward pass.

    Uses the plain head and MATH attention, because the fused ones have no second derivative.
    """
    parameters = list(model.parameters())
    sizes, size = [p.numel() for p in parameters], max(1, _TOKENS_AT_ONCE // (windows.shape[1] - 1))

    def product(vector: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(vector.split(sizes), parameters, strict=True)]
        total = torch.zeros_like(vector)
        with sdpa_kernel(SDPBackend.MATH):
            for start in range(0, len(windows), size):
                batch = torch.from_numpy(windows[start : start + size]).to(vector.device)
                logits = model.logits(batch[:, :-1]).flatten(0, 1)
                loss = F.cross_entropy(logits, batch[:, 1:].flatten()) * (len(batch) / len(windows))
                gradients = torch.autograd.grad(loss, parameters, create_graph=True)
                total += parameters_to_vector(torch.autograd.grad(gradients, parameters, parts))
        return total

    return product


def largest_eigenvalue(product: Product, start: Tensor, max_iterations: int) -> dict[str, Any]:
    """The `largest_eigenvalue` of a symmetric matrix by power iteration from `start` [P].

    `residual`: ‖H v − λ v‖ / |λ| for its unit vector v, 0 for an exact eigenvector. `iterations`: products used.
    `settled`: whether the last iteration changed it by less than 0.1%.

    Power iteration finds the eigenvalue of largest magnitude. If that is negative, a second round on the matrix minus
    that value, which has no negative eigenvalues, finds the largest.
    """
    found = _power_iteration(product, start, max_iterations)
    if found["largest_eigenvalue"] >= 0:
        return found
    above = _power_iteration(product, start, max_iterations, shift=found["largest_eigenvalue"])
    return {**above, "iterations": found["iterations"] + above["iterations"]}


def _power_iteration(product: Product, start: Tensor, max_iterations: int, shift: float = 0.0) -> dict[str, Any]:
    """Iterates on the matrix minus `shift`; returns an eigenvalue of the matrix itself."""
    image, values, settled = start, [], False
    while not settled and len(values) < max_iterations:
        vector = image / image.norm()
        image = product(vector)
        values.append(torch.dot(vector, image).item())
        residual = (image - values[-1] * vector).norm().item() / abs(values[-1])
        settled = len(values) > 1 and abs(values[-1] - values[-2]) <= _TOLERANCE * abs(values[-1])
        image = image - shift * vector
    return {"largest_eigenvalue": values[-1], "residual": residual, "iterations": len(values), "settled": settled}


def loss_rises(
    model: Transformer, loss: Callable[[], float], relative_norms: Sequence[float], draws: int, seed: int
) -> list[dict[str, Any]]:
    """How much `loss()` rises when Gaussian noise is added to the model's weights. Restores the weights afterwards.

    The noise of each tensor has `relative_norm` times the tensor's norm, so that all of it has `norm`. All norms use
    the same directions. `rises`: loss with the noise minus loss without it, one for each draw.
    """
    weights = [(p, p.detach().clone()) for p in model.parameters()]
    total = torch.stack([saved.norm() for _, saved in weights]).norm().item()
    calm = loss()

    def rise(relative: float, draw: int) -> float:
        generator = torch.Generator().manual_seed((seed << 20) + draw)
        for parameter, saved in weights:
            noise = torch.randn(saved.shape, generator=generator)
            noise = (noise / noise.norm()).to(saved)
            parameter.data.copy_(saved + relative * saved.norm() * noise)
        return loss() - calm

    try:
        found = [(relative, [rise(relative, draw) for draw in range(draws)]) for relative in relative_norms]
    finally:
        for parameter, saved in weights:
            parameter.data.copy_(saved)
    return [
        {"relative_norm": relative, "norm": relative * total, **mean_and_std(rises), "rises": rises}
        for relative, rises in found
    ]
