"""A growth, applied to the master weights and the optimizer: what joins starts from what was trained."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from est_cli.model.transformer import Transformer, row_kind
from est_cli.subnet.plan import Growth, n_rows, sampled_rows, whole_plan
from est_cli.training.optimizer import SampledAdamW
from est_cli.training.stacks import as_rows


@torch.no_grad()
def grow(model: Transformer, optimizer: SampledAdamW, growth: Growth, moments: Literal["copy", "reset"]) -> None:
    """Make the larger model of `growth` of the smaller one, in place, and let the optimizer move it.

    A layer that is copied brings its moments and step counts; with `moments="reset"` only where it takes its own new
    place, while the copies begin with none.
    """
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    optimizer.join(growth.after)
    sources, joined = growth.sources, set(growth.joined)
    for layer in reversed(range(len(sources))):
        if sources[layer] == layer:
            continue
        for name in _of_layer(parameters, layer):
            source = name.replace(f"blocks.{layer}.", f"blocks.{sources[layer]}.", 1)
            resets = layer in joined and moments == "reset"
            if sources[layer] is None:
                if growth.method == "zero" and name.endswith(_OUTPUTS):
                    parameters[name].zero_()
                continue
            for tensors in (parameters, *(() if resets else (optimizer.moments, optimizer.squares))):
                tensors[name].copy_(tensors[source])
            optimizer.counts[name][:] = 0 if resets else optimizer.counts[source]
            if resets:
                optimizer.moments[name].zero_()
                optimizer.squares[name].zero_()
    _silence_new_units(parameters, model, growth)


_OUTPUTS = ("attention.out.weight", "attention.out.bias", "mlp.down.weight", "mlp.down.bias")


def _silence_new_units(parameters: Mapping[str, Tensor], model: Transformer, growth: Growth) -> None:
    """Heads and neurons that join begin with output rows of 0: the function stays."""
    plan = whole_plan(growth.before)
    for layer in range(growth.before.n_layers):
        for name in _of_layer(parameters, layer):
            kind = row_kind(name)
            if kind in ("heads", "neurons") and n_rows(kind, growth.before) != n_rows(kind, growth.after):
                new = torch.ones(n_rows(kind, model.config), dtype=torch.bool)
                new[sampled_rows(kind, model.config, plan, layer)] = False
                as_rows(name, parameters[name], model.config)[new.to(parameters[name].device)] = 0.0


def _of_layer(names: Mapping[str, Tensor], layer: int) -> Iterator[str]:
    return (name for name in names if name.startswith(f"blocks.{layer}."))
