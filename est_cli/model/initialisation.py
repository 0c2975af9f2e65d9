"""Initial weights, a pure function of the seed, drawn on the CPU so that every device starts alike.

gpt2        Radford et al. (2019): normal with standard deviation 0.02 everywhere; the output projections of
            both residual branches are divided by sqrt(2 · n_layers).
tinyllama   Zhang et al. (2024), after GPT-NeoX: normal with sqrt(2 / (5 · d_model)); the output projections
            of both branches 1 / (n_layers · sqrt(d_model)).

Biases start at 0 and norm weights at 1 in both.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from est_cli.config import ModelConfig
from est_cli.model.transformer import Transformer, set_parameter


def standard_deviations(model: ModelConfig) -> tuple[float, float]:
    """Of ordinary matrices, and of the residual output projections."""
    if model.init == "gpt2":
        return 0.02, 0.02 / math.sqrt(2 * model.n_layers)
    return math.sqrt(2 / (5 * model.d_model)), 1 / (model.n_layers * math.sqrt(model.d_model))


@torch.no_grad()
def initialise(
    model: Transformer,
    seed: int,
    device: torch.device | str = "cpu",
    own: Callable[[Tensor], Tensor] = lambda whole: whole,
) -> Transformer:
    """Give the model on `device` its parameters, of each what this process holds as its `own`; returns the model.

    One parameter after the other is drawn, on the CPU, so that a meta model needs memory for what is held and for its
    largest parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    ordinary, residual = standard_deviations(model.config)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        if name.endswith(".bias"):
            values.zero_()
        elif "norm" in name:
            values.fill_(1.0)
        else:
            output = name.endswith(("attention.out.weight", "mlp.down.weight"))
            values.normal_(0.0, residual if output else ordinary, generator=generator)
        set_parameter(model, name, own(values).to(device))
    return model
