"""Initial weights, a pure function of the seed, drawn on the CPU so that every device starts alike.

gpt2        Radford et al. (2019): normal with standard deviation 0.02 everywhere; the output projections of
            both residual branches are divided by sqrt(2 · n_layers).
tinyllama   Zhang et al. (2024), after GPT-NeoX: normal with sqrt(2 / (5 · d_model)); the output projections
            of both branches 1 / (n_layers · sqrt(d_model)).

Biases start at 0 and norm weights at 1 in both.
"""

import math

import torch

from est_cli.config import ModelConfig
from est_cli.model.transformer import Transformer


def standard_deviations(model: ModelConfig) -> tuple[float, float]:
    """Of ordinary matrices, and of the residual output projections."""
    if model.init == "gpt2":
        return 0.02, 0.02 / math.sqrt(2 * model.n_layers)
    return math.sqrt(2 / (5 * model.d_model)), 1 / (model.n_layers * math.sqrt(model.d_model))


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> Transformer:
    """Fill every parameter of a model that lives on the CPU; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    ordinary, residual = standard_deviations(model.config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            output = name.endswith(("attention.out.weight", "mlp.down.weight"))
            parameter.normal_(0.0, residual if output else ordinary, generator=generator)
    return model
