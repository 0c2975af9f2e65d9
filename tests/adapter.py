"""The product's models, plans and updates in the reference's terms.

H query heads, K key/value heads, E head_dim, F neurons, as in reference.py.
"""

from collections.abc import Mapping, Sequence

import torch
from reference import ReferencePlan, sampled_rows
from torch import Tensor

from est_cli.config import ModelConfig
from est_cli.subnet.plan import Plan
from est_cli.training.subnetwork import Update


def reference_plan(plan: Plan) -> ReferencePlan:
    layers = plan.layers.tolist()
    units = [dict(zip(layers, kept.tolist(), strict=True)) for kept in (plan.heads, plan.kv_heads, plan.neurons)]
    return ReferencePlan(layers, *units)


def reference_tensors(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or gradients, of the full product model: fused projections cut into their heads and neurons."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            found[name.replace("norm.", "final_norm.")] = tensor
            continue
        _, layer, module, *rest = name.split(".")
        parts = {module: tensor} if "norm" in module else _parts(model, ".".join(rest), tensor)
        found |= {f"{layer}.{part}.{rest[-1]}": cut for part, cut in parts.items()}
    return found


def _parts(model: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """`name` is that of a projection with its weight or bias: out.weight."""
    H, K, E = model.n_heads, model.n_kv_heads, model.head_dim
    module, leaf = name.split(".")
    if module == "qkv":
        heads = tensor.reshape(H + 2 * K, E, *tensor.shape[1:])
        return dict(zip("qkv", heads.split([H, K, K]), strict=True))
    if module == "out":
        return {"o": tensor.reshape(H, E, model.d_model) if leaf == "weight" else tensor}
    if module == "up" and model.mlp == "swiglu":
        return dict(zip(("gate", "up"), tensor.chunk(2), strict=True))
    return {module: tensor}


def full_size(updates: Sequence[Update], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of one step in the full model's shapes; NaN in every row that no update touches."""
    found = {name: torch.full_like(weight, torch.nan, requires_grad=False) for name, weight in weights.items()}
    assert len({update.name for update in updates}) == len(updates), "one parameter, one update"
    for update in updates:
        if update.rows is None:
            assert update.gradient.shape == found[update.name].shape, update.name
            found[update.name].copy_(update.gradient)
            continue
        rows = torch.from_numpy(update.rows)
        gradient = update.gradient.reshape(len(rows), -1)
        found[update.name].view(-1, gradient.shape[1])[rows] = gradient.to(weights[update.name].dtype)
    return found


def assert_only_sampled(gradients: Mapping[str, Tensor], plan: ReferencePlan) -> dict[str, Tensor]:
    """`gradients` (the reference's names, NaN where untouched) cover exactly the plan's rows; NaN becomes 0."""
    for name, gradient in gradients.items():
        sampled = torch.zeros_like(gradient, dtype=torch.bool)
        for row in sampled_rows(name, plan):
            sampled[row] = True
        assert torch.equal(~gradient.isnan(), sampled), f"{name}: not the rows of the plan"
    return {name: gradient.nan_to_num(nan=0.0) for name, gradient in gradients.items()}
