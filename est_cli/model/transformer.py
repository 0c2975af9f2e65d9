"""One decoder for the full model and for its packed subnetworks; GPT-2 and Llama are settings of it.

B batch, T tokens, D d_model, H query heads, K key/value heads, E head_dim, F d_ff, V vocab_size

Weights are neuron-major, so that what one head or neuron owns is contiguous:

attention.qkv.weight  [(H + 2K)·E, D]   query, then key, then value heads
attention.out.weight  [H·E, D]          row-major by input: head h contributes value_h · rows of h
mlp.up.weight         [F, D]            SwiGLU: [2F, D], gate then up
mlp.down.weight       [F, D]            neuron f contributes activation_f · row f
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from est_cli.config import ModelConfig
from est_cli.kernels.dispatch import TORCH, Kernels
from est_cli.subnet.plan import RowKind, Subnetwork

ROW_KINDS: dict[str, RowKind] = {
    "attention.qkv.weight": "qkv",
    "attention.qkv.bias": "qkv",
    "attention.out.weight": "heads",
    "mlp.up.weight": "up",
    "mlp.up.bias": "up",
    "mlp.down.weight": "neurons",
}
"""Parameters of a block whose rows are sampled; all others belong to the layer as a whole."""


@dataclass(frozen=True)
class BlockMask:
    """Literal 0/1 masks of one layer, rescale included: what `kernels=masked` multiplies by.

    heads [H], neurons [F]; `layer` [2], of the attention and MLP branches, is 0 for a skipped layer.
    """

    heads: Tensor
    neurons: Tensor
    layer: Tensor


class Linear(nn.Linear):
    """Left uninitialised: `initialise` draws the weights."""

    def reset_parameters(self) -> None:
        pass


class ResidualOutput(nn.Module):
    """residual + scale · (x W + b / unit) with W [in, D]: the output projection of a branch.

    `scale` multiplies the whole branch. It is a scalar tensor, so the scales of a plan change no compiled graph. `unit`
    is the factor in it that rescales heads or neurons; the bias is added after that rescale, so it is divided by
    `unit` first. Without a scale: residual + x W + b.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_out, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor, residual: Tensor, unit: float, scale: Tensor | None) -> Tensor:
        if scale is None:
            return residual + F.linear(x, self.weight.t(), self.bias)
        # Dividing the bias (D numbers) fuses the scale into the residual addition and saves a pass over the output.
        bias = self.bias if self.bias is None or unit == 1.0 else self.bias / unit
        return torch.addcmul(residual, F.linear(x, self.weight.t(), bias), scale)


class Attention(nn.Module):
    def __init__(self, model: ModelConfig, device=None, dtype=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = model.n_heads, model.n_kv_heads, model.head_dim
        all_heads = model.n_heads + 2 * model.n_kv_heads
        self.qkv = Linear(model.d_model, all_heads * model.head_dim, model.bias, device, dtype)
        self.out = ResidualOutput(model.n_heads * model.head_dim, model.d_model, model.bias, device, dtype)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """[B, T, D] → the heads' values [B, T, H·E], before the output projection."""
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim)
        queries_and_keys, value = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        if rope is not None:
            queries_and_keys = rotate(queries_and_keys, *rope)
        query, key = queries_and_keys.split([self.n_heads, self.n_kv_heads], dim=2)
        values = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.n_heads != self.n_kv_heads,
        ).transpose(1, 2)
        if mask is not None:
            values = values * mask[:, None]
        return values.reshape(batch, length, -1)


class MLP(nn.Module):
    def __init__(self, model: ModelConfig, device=None, dtype=None):
        super().__init__()
        self.gated = model.gated
        self.up = Linear(model.d_model, (2 if model.gated else 1) * model.d_ff, model.bias, device, dtype)
        self.down = ResidualOutput(model.d_ff, model.d_model, model.bias, device, dtype)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] → the neurons' activations [B, T, F], before the output projection."""
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            activations = F.silu(gate) * up
        else:
            activations = F.gelu(self.up(x), approximate="tanh")
        return activations if mask is None else activations * mask


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream with its rescale."""

    def __init__(self, shape: Subnetwork, device=None, dtype=None):
        super().__init__()
        self.head_scale, self.mlp_scale = shape.head_scale, shape.mlp_scale
        scales = torch.ones(2, device=device) if shape.is_scaled else None
        self.register_buffer("scales", scales, persistent=False)  # of the attention and MLP branches
        self.norm1 = _norm(shape.model, device, dtype)
        self.attention = Attention(shape.model, device, dtype)
        self.norm2 = _norm(shape.model, device, dtype)
        self.mlp = MLP(shape.model, device, dtype)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: BlockMask | None = None) -> Tensor:
        scales = self.scales if mask is None else mask.layer
        attention_scale, mlp_scale = (None, None) if scales is None else scales
        values = self.attention(self.norm1(x), rope, None if mask is None else mask.heads)
        x = self.attention.out(values, x, self.head_scale, attention_scale)
        activations = self.mlp(self.norm2(x), None if mask is None else mask.neurons)
        return self.mlp.down(activations, x, self.mlp_scale, mlp_scale)


class Transformer(nn.Module):
    """A decoder-only language model of the given shape, left uninitialised.

    `shape` is a `Subnetwork`, or a `ModelConfig` for the full model.
    """

    def __init__(
        self, shape: Subnetwork | ModelConfig, device=None, dtype=None, recompute=False, kernels: Kernels = TORCH
    ):
        super().__init__()
        shape = Subnetwork(shape) if isinstance(shape, ModelConfig) else shape
        model = self.config = shape.model
        self.recompute, self.kernels = recompute, kernels

        def table(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, model.d_model, device=device, dtype=dtype))

        self.embedding = table(model.vocab_size)
        self.positions = table(model.max_seq_len) if model.position == "learned" else None
        self.blocks = nn.ModuleList(Block(shape, device, dtype) for _ in range(model.n_layers))
        self.norm = _norm(model, device, dtype)
        self.head = None if model.tie_embeddings else table(model.vocab_size)
        self._rope: tuple[Tensor, Tensor] | None = None

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the embedding where the head is tied."""
        return self.embedding if self.head is None else self.head

    def hidden(self, inputs: Tensor, masks: list[BlockMask] | None = None) -> Tensor:
        """Token ids [B, T] → normalised final states [B, T, D]."""
        # A tied table also gets the head's gradient. On a CPU a sparse one adds only the rows of these inputs to that.
        x = F.embedding(inputs, self.embedding, sparse=self.head is None and inputs.device.type == "cpu")
        if self.positions is not None:
            x = x + self.positions[: inputs.shape[1]]
        rope = self._rope_tables(x)
        for index, block in enumerate(self.blocks):
            mask = None if masks is None else masks[index]
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask)
        return self.norm(x)

    def compile_blocks(self) -> None:
        """Compile block by block: all blocks have one shape, so that they share one graph."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def logits(self, inputs: Tensor) -> Tensor:
        """Token ids [B, T] → [B, T, V]."""
        return F.linear(self.hidden(inputs), self.head_weight)

    def forward(self, inputs: Tensor, targets: Tensor, masks: list[BlockMask] | None = None) -> Tensor:
        """Mean cross-entropy, in nats, of `targets` [B, T] given `inputs` [B, T]."""
        hidden = self.hidden(inputs, masks)
        return self.kernels.linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten())

    def _rope_tables(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.position != "rope":
            return None
        length = x.shape[1]
        if self._rope is None or len(self._rope[0]) < length or self._rope[0].device != x.device:
            self._rope = rope_tables(self.config, length, x.device, x.dtype)
        cosine, sine = self._rope
        return cosine[:length], sine[:length]


def rope_tables(model: ModelConfig, length: int, device, dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, E/2] of rotary position embedding (Su et al., 2021)."""
    exact = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, model.head_dim, 2, device=device, dtype=exact) / model.head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=exact), model.rope_theta**-exponents)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of [B, T, heads, E] in the half-rotation form of Llama's published weights."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def row_kind(name: str) -> RowKind | None:
    """The row kind of a parameter by its full name, or None if it is not sampled by rows."""
    return ROW_KINDS.get(name.split(".", 2)[2]) if name.startswith("blocks.") else None


def layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to by its full name, or None."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def with_layer(name: str, layer: int) -> str:
    """The name that a parameter or a module of a block has in another layer."""
    return re.sub(r"(?<=^blocks\.)\d+", str(layer), name)


def set_parameter(module: nn.Module, name: str, data: Tensor) -> None:
    """Replace a parameter, by its full name, by one that holds `data`."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(data))


@torch.no_grad()
def initialise(
    model: Transformer,
    seed: int,
    device: torch.device | str = "cpu",
    own: Callable[[Tensor], Tensor] = lambda whole: whole,
) -> Transformer:
    """Give the model its initial weights on `device`; `own` cuts out the part of a parameter that this process holds.

    The weights depend on the seed only. They are drawn on the CPU, so every device starts alike, and one by one, so a
    meta model needs memory only for what is held and for its largest parameter. Returns the model.

    gpt2        Radford et al. (2019): normal with standard deviation 0.02 everywhere; the output projections of
                both residual branches are divided by sqrt(2 · n_layers).
    tinyllama   Zhang et al. (2024), after GPT-NeoX: normal with sqrt(2 / (5 · d_model)); the output projections
                of both branches 1 / (n_layers · sqrt(d_model)).

    Biases start at 0 and norm weights at 1 in both.
    """
    generator, config = torch.Generator().manual_seed(seed), model.config
    if config.init == "gpt2":
        ordinary, residual = 0.02, 0.02 / math.sqrt(2 * config.n_layers)
    else:
        ordinary, residual = math.sqrt(2 / (5 * config.d_model)), 1 / (config.n_layers * math.sqrt(config.d_model))
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


def _norm(model: ModelConfig, device, dtype) -> nn.Module:
    kind = nn.LayerNorm if model.norm == "layernorm" else nn.RMSNorm
    return kind(model.d_model, eps=model.norm_eps, device=device, dtype=dtype)
