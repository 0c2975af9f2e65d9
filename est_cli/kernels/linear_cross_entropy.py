"""The LM head and its loss in one, chunked over tokens, so that the logits never exist as a whole.

The forward pass computes both gradients on the way (they need the same softmax), 6·D·V FLOPs a token as the
ordinary forward and backward do.

N tokens, D d_model, V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_CHUNK_ELEMENTS = 8 << 20
CUDA_CHUNK_ELEMENTS = 256 << 20


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, as a scalar in at least float32.

    hidden [N, D], weight [V, D], targets [N] of int64 below V.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets)
    total = sum(_losses(_logits(hidden[rows], weight), targets[rows]).sum() for rows in _chunks(hidden, weight))
    return total / len(hidden)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=_accumulator(weight))
        total = torch.zeros((), dtype=_accumulator(hidden), device=hidden.device)
        for rows in _chunks(hidden, weight):
            logits, target = _logits(hidden[rows], weight), targets[rows, None]
            logarithm = torch.log_softmax(logits, dim=-1)
            total -= logarithm.gather(1, target).sum()
            gradient = logarithm.exp_()
            gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand_as(target))
            gradient = gradient.mul_(1.0 / len(hidden)).to(hidden.dtype)
            hidden_gradient[rows] = gradient @ weight
            if weight_gradient.dtype == gradient.dtype:
                weight_gradient.addmm_(gradient.t(), hidden[rows])
            else:
                weight_gradient += gradient.t() @ hidden[rows]
        ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            weight_gradient * scale.to(weight_gradient.dtype),
            None,
        )


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, weight).to(_accumulator(hidden))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of tokens whose logits stay small."""
    elements = CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else CUDA_CHUNK_ELEMENTS
    size = max(1, elements // len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
