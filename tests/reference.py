"""Evolving Subnetwork Training written a second time, only from the paper's description.

Plain loops over layers, heads and neurons; no fused projections, no packing, no masks on weights, and nothing from
est_cli but the sizes of a model. Slow on purpose: the product's fast paths are compared with it. All of it runs in the
parameters' dtype, which the tests choose to be float64.

Shapes: B batch, T tokens, V vocabulary, D model, L layers, H query heads, K key/value heads, E head_dim, F neurons.
"""

import copy
import math
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from est_cli.config import ModelConfig

Tensors = dict[str, Tensor]
Row = int | EllipsisType
"""What moves together under `freeze`: an index on the leading axis (head, neuron), or `...` for a whole tensor."""


@dataclass
class ReferencePlan:
    """What one optimizer step keeps: indices into the full model, ascending. Dict keys are layer indices.

    `scales` of a layer: of its kept heads, of its kept neurons, and of both its branches; without them the paper's,
    N_H/|I_H|, F/|I_M| and 1.
    """

    layers: list[int]
    heads: dict[int, list[int]]
    kv_heads: dict[int, list[int]]
    neurons: dict[int, list[int]]
    scales: dict[int, tuple[float, float, float]] | None = None


def full_plan(model: ModelConfig) -> ReferencePlan:
    """The plan that keeps everything."""
    layers = list(range(model.n_layers))
    counts = (model.n_heads, model.n_kv_heads, model.d_ff)
    return ReferencePlan(layers, *({layer: list(range(units)) for layer in layers} for units in counts))


def _norm(model: ModelConfig, parameters: Tensors, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the last axis. x [B, T, D] -> [B, T, D]."""
    if model.norm == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + model.norm_eps) * parameters[f"{name}.weight"]
    return x + parameters[f"{name}.bias"] if model.norm == "layernorm" else x


def _rotate(model: ModelConfig, x: Tensor) -> Tensor:
    """RoPE in Hugging Face's half-rotation form: feature j turns with feature j + E/2. x [B, T, E] -> [B, T, E].

    The angles are always float64, so that they are as exact as the dtype of x allows.
    """
    half = model.head_dim // 2
    frequencies = [model.rope_theta ** (-2.0 * j / model.head_dim) for j in range(half)]
    angles = [[t * frequency for frequency in frequencies] for t in range(x.shape[1])]
    angles = torch.tensor(angles, dtype=torch.float64)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _project(model: ModelConfig, parameters: Tensors, name: str, index: int, x: Tensor) -> Tensor:
    """One head (or one neuron) of a linear layer. x [B, T, D] -> [B, T, E] (or [B, T])."""
    out = x @ parameters[f"{name}.weight"][index].transpose(0, -1)
    return out + parameters[f"{name}.bias"][index] if model.bias else out


def attention(
    model: ModelConfig, parameters: Tensors, layer: int, heads: list[int], x: Tensor, scale: float | None = None
) -> Tensor:
    """(H / kept) * sum over the kept heads of head_i W_O,i, before the output bias. x [B, T, D] -> [B, T, D]."""
    T = x.shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    total = torch.zeros_like(x)
    for head in heads:
        kv_head = head // (model.n_heads // model.n_kv_heads)
        query = _project(model, parameters, f"{layer}.q", head, x)
        key = _project(model, parameters, f"{layer}.k", kv_head, x)
        value = _project(model, parameters, f"{layer}.v", kv_head, x)
        if model.position == "rope":
            query, key = _rotate(model, query), _rotate(model, key)
        scores = (query @ key.transpose(1, 2)) / math.sqrt(model.head_dim)
        scores = scores.masked_fill(future, -math.inf)
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        weights = weights / weights.sum(dim=-1, keepdim=True)
        total = total + (weights @ value) @ parameters[f"{layer}.o.weight"][head]
    return (model.n_heads / len(heads) if scale is None else scale) * total


def mlp(
    model: ModelConfig, parameters: Tensors, layer: int, neurons: list[int], x: Tensor, scale: float | None = None
) -> Tensor:
    """(F / kept) * sum over the kept neurons of activation_f W2[f], before the output bias. x [B, T, D] -> same."""
    total = torch.zeros_like(x)
    for neuron in neurons:
        up = _project(model, parameters, f"{layer}.up", neuron, x)
        if model.mlp == "swiglu":
            gate = _project(model, parameters, f"{layer}.gate", neuron, x)
            activation = gate * torch.sigmoid(gate) * up
        else:
            activation = 0.5 * up * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (up + 0.044715 * up**3)))
        total = total + activation[..., None] * parameters[f"{layer}.down.weight"][neuron]
    return (model.d_ff / len(neurons) if scale is None else scale) * total


def _check(model: ModelConfig, plan: ReferencePlan) -> None:
    """A wrong adapter must fail here, not show up as a small difference or, worse, as none."""
    everything = full_plan(model)
    for layer in plan.layers:
        for kept, all_of_them in (
            (plan.layers, everything.layers),
            (plan.heads[layer], everything.heads[layer]),
            (plan.neurons[layer], everything.neurons[layer]),
        ):
            assert kept and kept == [unit for unit in all_of_them if unit in set(kept)], (layer, kept)
        served = sorted({head // (model.n_heads // model.n_kv_heads) for head in plan.heads[layer]})
        assert plan.kv_heads[layer] == served, (layer, plan.kv_heads[layer], served)


def logits(
    model: ModelConfig, parameters: Tensors, plan: ReferencePlan, inputs: Tensor, rescale_layers: bool = False
) -> Tensor:
    """The subnetwork's output. inputs [B, T] -> [B, T, V]."""
    _check(model, plan)
    x = parameters["embedding"][inputs]
    if model.position == "learned":
        x = x + parameters["positions"][: inputs.shape[1]]
    for layer in plan.layers:
        head_scale = mlp_scale = None
        branch_scale = model.n_layers / len(plan.layers) if rescale_layers else 1.0
        if plan.scales is not None:
            head_scale, mlp_scale, branch_scale = plan.scales[layer]
        normed = _norm(model, parameters, f"{layer}.norm1", x)
        branch = attention(model, parameters, layer, plan.heads[layer], normed, head_scale)
        x = x + branch_scale * (branch + (parameters[f"{layer}.o.bias"] if model.bias else 0.0))
        normed = _norm(model, parameters, f"{layer}.norm2", x)
        branch = mlp(model, parameters, layer, plan.neurons[layer], normed, mlp_scale)
        x = x + branch_scale * (branch + (parameters[f"{layer}.down.bias"] if model.bias else 0.0))
    head = parameters["embedding"] if model.tie_embeddings else parameters["head"]
    return _norm(model, parameters, "final_norm", x) @ head.T


def loss(
    model: ModelConfig, parameters: Tensors, plan: ReferencePlan, inputs: Tensor, targets: Tensor, rescale_layers: bool
) -> Tensor:
    """Mean cross-entropy in nats of the subnetwork. inputs, targets [B, T] -> scalar; differentiable."""
    out = logits(model, parameters, plan, inputs, rescale_layers)
    right = out.gather(-1, targets[..., None])[..., 0]
    return (torch.logsumexp(out, dim=-1) - right).mean()


def loss_and_gradients(
    model: ModelConfig, parameters: Tensors, plan: ReferencePlan, inputs: Tensor, targets: Tensor, rescale_layers: bool
) -> tuple[Tensor, Tensors]:
    """`loss`, and its gradient for every parameter: zeros for what the plan leaves out. Touches no `.grad`."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    value = loss(model, leaves, plan, inputs, targets, rescale_layers)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(leaves, gradients, strict=True))


def _split(name: str) -> tuple[int | None, str]:
    """'3.q.weight' -> (3, 'q.weight'); 'final_norm.weight' -> (None, 'final_norm.weight')."""
    first, _, rest = name.partition(".")
    return (int(first), rest) if first.isdigit() else (None, name)


def sampled_rows(name: str, plan: ReferencePlan) -> list[Row]:
    """The rows of a parameter that belong to the plan's subnetwork; [...] where the tensor belongs to it whole."""
    layer, part = _split(name)
    if layer is None:
        return [...]
    if layer not in plan.layers:
        return []
    if part in ("q.weight", "q.bias", "o.weight"):
        return list(plan.heads[layer])
    if part in ("k.weight", "k.bias", "v.weight", "v.bias"):
        return list(plan.kv_heads[layer])
    if part in ("up.weight", "up.bias", "gate.weight", "gate.bias", "down.weight"):
        return list(plan.neurons[layer])
    assert part in ("o.bias", "down.bias") or part.startswith(("norm1.", "norm2.")), name
    return [...]


def is_matrix(name: str) -> bool:
    """What weight decay is for: matrices and embeddings, no bias (a head's bias is not a matrix) and no norm."""
    return not name.endswith(".bias") and "norm" not in name


class ReferenceAdamW:
    """torch.optim.AdamW with a tensor of its own for each row: it skips one without a gradient, and counts its steps.

    `zero_grad`: every row takes a step, an unsampled one with gradient 0 (it decays and drifts on its momentum).
    `freeze`: only the plan's rows move. Updates `parameters` in place.
    """

    def __init__(self, parameters: Tensors, model: ModelConfig, unsampled: str, weight_decay: float, **options: Any):
        assert unsampled in ("zero_grad", "freeze"), unsampled
        everything, self.unsampled = full_plan(model), unsampled
        self.rows: dict[tuple[str, Row], nn.Parameter] = {
            (name, row): nn.Parameter(tensor[row])  # shares its memory
            for name, tensor in parameters.items()
            for row in sampled_rows(name, everything)
        }
        decayed, others = [], []
        for (name, _), row in self.rows.items():
            (decayed if is_matrix(name) else others).append(row)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.torch = torch.optim.AdamW(groups, foreach=False, **options)

    def step(
        self, gradients: Tensors, plan: ReferencePlan, joined: ReferencePlan, lr: float, grad_clip: float
    ) -> Tensor:
        """One update; returns the norm before clipping. gradients: shaped like the parameters, 0 in unsampled rows.

        What has not joined the model stands still, `zero_grad` or not.
        """
        for (name, row), parameter in self.rows.items():
            is_sampled = row in sampled_rows(name, plan)
            assert is_sampled or not gradients[name][row].any(), f"{name}[{row}] is not sampled but has a gradient"
            moves = row in sampled_rows(name, joined) and (is_sampled or self.unsampled == "zero_grad")
            parameter.grad = gradients[name][row] if moves else None
        norm = torch.nn.utils.clip_grad_norm_(self.rows.values(), grad_clip)
        for group in self.torch.param_groups:
            group["lr"] = lr
        self.torch.step()
        return norm


@torch.no_grad()
def grow(
    optimizer: ReferenceAdamW,
    before: ReferencePlan,
    sources: list[int | None],
    new_heads: range,
    new_neurons: range,
    zero: bool,
    copy_moments: bool,
) -> None:
    """Layers join: layer i of the larger model starts from layer sources[i] of the smaller one, in place.

    None stands for the initial weights, with output projections of 0 if `zero`. The first layer with a source is
    that layer itself, and keeps its moments and steps; the others are copies. New heads and neurons of the old layers
    begin with outputs of 0.
    """
    old = {at: row.clone() for at, row in optimizer.rows.items()}
    states = {at: copy.deepcopy(optimizer.torch.state[row]) for at, row in optimizer.rows.items()}
    for (name, index), row in optimizer.rows.items():
        layer, part = _split(name)
        if layer is None:
            continue
        source = sources[layer]
        if source is not None:
            there = f"{source}.{part}", index
            row.copy_(old[there])
            keeps = source not in sources[:layer] or copy_moments
            optimizer.torch.state[row] = copy.deepcopy(states[there]) if keeps else {}
        elif zero and part in ("o.weight", "o.bias", "down.weight", "down.bias"):
            row.zero_()
        if layer in before.layers and index in {"o.weight": new_heads, "down.weight": new_neurons}.get(part, ()):
            row.zero_()
