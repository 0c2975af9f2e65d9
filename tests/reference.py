"""Evolving Subnetwork Training written a second time, only from the paper's description.

Plain loops over layers, heads and neurons; no fused projections, no packing, no masks on weights, nothing from est_cli.
Slow on purpose: it is what the product's fast paths are compared against. All of it runs in the parameters' dtype,
which the tests choose to be float64.

Shapes: B batch, T tokens, V vocabulary, D model, L layers, H query heads, K key/value heads, E head_dim, F neurons.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Row = int | EllipsisType
"""What moves together under `freeze`: an index on the leading axis (head, neuron), or `...` for a whole tensor."""


@dataclass(frozen=True)
class Sizes:
    """The full model. `bias` is about the linear projections; a LayerNorm always has one, an RMSNorm never."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_ff: int
    vocab_size: int
    max_seq_len: int
    norm: str
    position: str
    mlp: str
    bias: bool
    tied: bool
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def heads_per_kv_head(self) -> int:
        return self.n_heads // self.n_kv_heads


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


def full_plan(sizes: Sizes) -> ReferencePlan:
    """The plan that keeps everything."""
    layers = list(range(sizes.n_layers))
    counts = (sizes.n_heads, sizes.n_kv_heads, sizes.d_ff)
    return ReferencePlan(layers, *({layer: list(range(units)) for layer in layers} for units in counts))


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the full model, in the reference's own layout (see the module's legend)."""
    D, H, K, E, F = sizes.d_model, sizes.n_heads, sizes.n_kv_heads, sizes.head_dim, sizes.d_ff
    hidden = {"up": (F,), "gate": (F,)} if sizes.mlp == "swiglu" else {"up": (F,)}
    into = {"q": (H, E), "k": (K, E), "v": (K, E), **hidden}
    found: dict[str, tuple[int, ...]] = {"embedding": (sizes.vocab_size, D)}
    if sizes.position == "learned":
        found["positions"] = (sizes.max_seq_len, D)
    for layer in range(sizes.n_layers):
        found |= {f"{layer}.{name}.weight": (*rows, D) for name, rows in into.items()}
        found |= {f"{layer}.o.weight": (H, E, D), f"{layer}.down.weight": (F, D)}
        if sizes.bias:
            found |= {f"{layer}.{name}.bias": rows for name, rows in into.items()}
            found |= {f"{layer}.o.bias": (D,), f"{layer}.down.bias": (D,)}
    for norm in (*(f"{layer}.norm{i}" for layer in range(sizes.n_layers) for i in (1, 2)), "final_norm"):
        found[f"{norm}.weight"] = (D,)
        if sizes.norm == "layernorm":
            found[f"{norm}.bias"] = (D,)
    if not sizes.tied:
        found["head"] = (sizes.vocab_size, D)
    return found


def _norm(sizes: Sizes, parameters: Tensors, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the last axis. x [B, T, D] -> [B, T, D]."""
    if sizes.norm == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + sizes.norm_eps) * parameters[f"{name}.weight"]
    return x + parameters[f"{name}.bias"] if sizes.norm == "layernorm" else x


def _rotate(sizes: Sizes, x: Tensor) -> Tensor:
    """RoPE in Hugging Face's half-rotation form: feature j turns with feature j + E/2. x [B, T, E] -> [B, T, E].

    The angles are always float64, so that they are as exact as the dtype of x allows.
    """
    half = sizes.head_dim // 2
    frequencies = [sizes.rope_theta ** (-2.0 * j / sizes.head_dim) for j in range(half)]
    angles = [[t * frequency for frequency in frequencies] for t in range(x.shape[1])]
    angles = torch.tensor(angles, dtype=torch.float64)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _project(sizes: Sizes, parameters: Tensors, name: str, index: int, x: Tensor) -> Tensor:
    """One head (or one neuron) of a linear layer. x [B, T, D] -> [B, T, E] (or [B, T])."""
    out = x @ parameters[f"{name}.weight"][index].transpose(0, -1)
    return out + parameters[f"{name}.bias"][index] if sizes.bias else out


def attention(
    sizes: Sizes, parameters: Tensors, layer: int, heads: list[int], x: Tensor, scale: float | None = None
) -> Tensor:
    """(H / kept) * sum over the kept heads of head_i W_O,i, before the output bias. x [B, T, D] -> [B, T, D]."""
    T = x.shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    total = torch.zeros_like(x)
    for head in heads:
        kv_head = head // sizes.heads_per_kv_head
        query = _project(sizes, parameters, f"{layer}.q", head, x)
        key = _project(sizes, parameters, f"{layer}.k", kv_head, x)
        value = _project(sizes, parameters, f"{layer}.v", kv_head, x)
        if sizes.position == "rope":
            query, key = _rotate(sizes, query), _rotate(sizes, key)
        scores = (query @ key.transpose(1, 2)) / math.sqrt(sizes.head_dim)
        scores = scores.masked_fill(future, -math.inf)
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        weights = weights / weights.sum(dim=-1, keepdim=True)
        total = total + (weights @ value) @ parameters[f"{layer}.o.weight"][head]
    return (sizes.n_heads / len(heads) if scale is None else scale) * total


def mlp(
    sizes: Sizes, parameters: Tensors, layer: int, neurons: list[int], x: Tensor, scale: float | None = None
) -> Tensor:
    """(F / kept) * sum over the kept neurons of activation_f W2[f], before the output bias. x [B, T, D] -> same."""
    total = torch.zeros_like(x)
    for neuron in neurons:
        up = _project(sizes, parameters, f"{layer}.up", neuron, x)
        if sizes.mlp == "swiglu":
            gate = _project(sizes, parameters, f"{layer}.gate", neuron, x)
            activation = gate * torch.sigmoid(gate) * up
        else:
            activation = 0.5 * up * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (up + 0.044715 * up**3)))
        total = total + activation[..., None] * parameters[f"{layer}.down.weight"][neuron]
    return (sizes.d_ff / len(neurons) if scale is None else scale) * total


def _check(sizes: Sizes, parameters: Tensors, plan: ReferencePlan) -> None:
    """A wrong adapter must fail here, not show up as a small difference or, worse, as none."""
    found = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    assert found == shapes(sizes), f"not the parameters of {sizes}: {set(found.items()) ^ set(shapes(sizes).items())}"
    everything = full_plan(sizes)

    def subset(kept: list[int], of: list[int]) -> bool:
        return len(kept) > 0 and list(kept) == [unit for unit in of if unit in set(kept)]

    assert plan.layers == [] or subset(plan.layers, everything.layers), plan.layers
    for layer in plan.layers:
        assert subset(plan.heads[layer], everything.heads[layer]), (layer, plan.heads[layer])
        assert subset(plan.neurons[layer], everything.neurons[layer]), (layer, plan.neurons[layer])
        served = sorted({head // sizes.heads_per_kv_head for head in plan.heads[layer]})
        assert list(plan.kv_heads[layer]) == served, (layer, plan.kv_heads[layer], served)


def logits(
    sizes: Sizes, parameters: Tensors, plan: ReferencePlan, inputs: Tensor, rescale_layers: bool = False
) -> Tensor:
    """The subnetwork's output. inputs [B, T] -> [B, T, V]."""
    _check(sizes, parameters, plan)
    x = parameters["embedding"][inputs]
    if sizes.position == "learned":
        x = x + parameters["positions"][: inputs.shape[1]]
    for layer in plan.layers:
        head_scale = mlp_scale = None
        branch_scale = sizes.n_layers / len(plan.layers) if rescale_layers else 1.0
        if plan.scales is not None:
            head_scale, mlp_scale, branch_scale = plan.scales[layer]
        normed = _norm(sizes, parameters, f"{layer}.norm1", x)
        branch = attention(sizes, parameters, layer, plan.heads[layer], normed, head_scale)
        x = x + branch_scale * (branch + (parameters[f"{layer}.o.bias"] if sizes.bias else 0.0))
        normed = _norm(sizes, parameters, f"{layer}.norm2", x)
        branch = mlp(sizes, parameters, layer, plan.neurons[layer], normed, mlp_scale)
        x = x + branch_scale * (branch + (parameters[f"{layer}.down.bias"] if sizes.bias else 0.0))
    head = parameters["embedding"] if sizes.tied else parameters["head"]
    return _norm(sizes, parameters, "final_norm", x) @ head.T


def loss(
    sizes: Sizes, parameters: Tensors, plan: ReferencePlan, inputs: Tensor, targets: Tensor, rescale_layers: bool
) -> Tensor:
    """Mean cross-entropy in nats of the subnetwork. inputs, targets [B, T] -> scalar; differentiable."""
    out = logits(sizes, parameters, plan, inputs, rescale_layers)
    right = out.gather(-1, targets[..., None])[..., 0]
    return (torch.logsumexp(out, dim=-1) - right).mean()


def loss_and_gradients(
    sizes: Sizes, parameters: Tensors, plan: ReferencePlan, inputs: Tensor, targets: Tensor, rescale_layers: bool
) -> tuple[Tensor, Tensors]:
    """`loss`, and its gradient for every parameter: zeros for what the plan leaves out. Touches no `.grad`."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    value = loss(sizes, leaves, plan, inputs, targets, rescale_layers)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(leaves, gradients, strict=True))


def clip(gradients: Tensors, max_norm: float) -> Tensor:
    """Scale gradients to a global 2-norm of at most max_norm, as torch.nn.utils.clip_grad_norm_ does.

    Replaces the values of the dict and returns the norm before clipping.
    """
    squares = [(gradient * gradient).sum() for gradient in gradients.values()]
    norm = torch.stack(squares).sum().sqrt()
    coefficient = min(1.0, max_norm / (norm.item() + 1e-6))
    for name in gradients:
        gradients[name] = gradients[name] * coefficient
    return norm


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


def matrices(names: Iterable[str]) -> set[str]:
    """What weight decay is for: matrices and embeddings, no bias (a head's bias is not a matrix) and no norm."""
    return {name for name in names if not name.endswith(".bias") and "norm" not in name}


@dataclass
class ReferenceAdamW:
    """torch.optim.AdamW's arithmetic, row after row, with what happens to unsampled rows written out.

    `zero_grad`: every row takes a step, an unsampled one with gradient 0 (it decays and drifts on its momentum).
    `freeze`: only the plan's rows move; each row counts its own steps, and that count corrects its bias.

    Updates `parameters` in place. `lr` may be assigned between steps. `first`, `second` (the moments, shaped like the
    parameters) and `steps` (by name and row) are the state.
    """

    parameters: Tensors
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decayed: set[str]
    unsampled: str

    def __post_init__(self) -> None:
        assert self.unsampled in ("zero_grad", "freeze"), self.unsampled
        assert self.decayed <= set(self.parameters), self.decayed - set(self.parameters)
        self.first = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        self.steps: dict[tuple[str, Row], int] = defaultdict(int)

    @torch.no_grad()
    def step(self, gradients: Tensors, plan: ReferencePlan, sizes: Sizes, joined: ReferencePlan | None = None) -> None:
        """One update. gradients: one tensor per parameter, shaped like it, and zero in every unsampled row.

        What has not joined the model stands still, `zero_grad` or not; without `joined` everything has.
        """
        assert set(gradients) == set(self.parameters), set(gradients) ^ set(self.parameters)
        everything = full_plan(sizes) if joined is None else joined
        for name, gradient in gradients.items():
            assert gradient.shape == self.parameters[name].shape, name
            sampled = sampled_rows(name, plan)
            for row in sampled_rows(name, everything):
                if row not in sampled:
                    assert not gradient[row].any(), f"{name}[{row}] is not sampled but has a gradient"
                    if self.unsampled == "freeze":
                        continue
                self._step_row(name, row, gradient[row])

    def _step_row(self, name: str, row: Row, gradient: Tensor) -> None:
        """Indexing with `row` gives a view, so the in-place operations below write into the tensors themselves."""
        beta1, beta2 = self.betas
        weight, first, second = self.parameters[name][row], self.first[name][row], self.second[name][row]
        self.steps[name, row] += 1
        count = self.steps[name, row]
        if name in self.decayed:
            weight.mul_(1.0 - self.lr * self.weight_decay)
        first.mul_(beta1).add_((1.0 - beta1) * gradient)
        second.mul_(beta2).add_((1.0 - beta2) * gradient * gradient)
        unbiased_first = first / (1.0 - beta1**count)
        unbiased_second = second / (1.0 - beta2**count)
        weight.sub_(self.lr * unbiased_first / (unbiased_second.sqrt() + self.eps))


@torch.no_grad()
def grow(
    parameters: Tensors,
    optimizer: ReferenceAdamW,
    before: ReferencePlan,
    sources: list[int | None],
    new_heads: list[int],
    new_neurons: list[int],
    zero: bool,
    copy_moments: bool,
) -> None:
    """Layers join: layer i of the larger model starts from layer sources[i] of the smaller one, in place.

    None stands for the initial weights, with output projections of 0 where `zero`. The first layer with a source is
    that layer itself, and keeps its moments and steps; the others are copies. New heads and neurons of the old layers
    begin with outputs of 0.
    """
    old, first, second = (
        {name: tensor.clone() for name, tensor in tensors.items()}
        for tensors in (parameters, optimizer.first, optimizer.second)
    )
    steps = dict(optimizer.steps)
    for layer, source in enumerate(sources):
        keeps = source not in sources[:layer] or copy_moments
        for name in [name for name in parameters if _split(name)[0] == layer]:
            part = _split(name)[1]
            if source is None:
                if zero and part in ("o.weight", "o.bias", "down.weight", "down.bias"):
                    parameters[name].zero_()
                continue
            there = f"{source}.{part}"
            parameters[name].copy_(old[there])
            for moments, before_moments in ((optimizer.first, first), (optimizer.second, second)):
                moments[name].copy_(before_moments[there] * keeps)
            for row in [..., *range(len(parameters[name]))]:
                optimizer.steps[name, row] = steps.get((there, row), 0) if keeps else 0
    for layer in before.layers:
        for head in new_heads:
            parameters[f"{layer}.o.weight"][head] = 0.0
        for neuron in new_neurons:
            parameters[f"{layer}.down.weight"][neuron] = 0.0
