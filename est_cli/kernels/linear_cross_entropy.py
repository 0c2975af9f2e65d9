"""The LM head and its loss in one, chunked over tokens, so that the logits never exist as a whole.

The forward pass computes both gradients on the way (they need the same softmax), 6·D·V FLOPs a token as the
ordinary forward and backward do. A chunk's logits are overwritten by their gradient.

N tokens, D d_model, V vocabulary
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 24 << 20
CUDA_CHUNK_ELEMENTS = 256 << 20
BLOCK_ELEMENTS = 1 << 20
"""Elements that the passes over a part of a chunk find in the CPU's cache."""

SoftmaxGradient = Callable[[Tensor, Tensor], Tensor]
"""(logits [n, V], targets [n]) → losses [n]; the logits become softmax − onehot, the gradient of their sum."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, as a scalar in at least float32.

    hidden [N, D], weight [V, D], targets [N] of int64 below V.
    """
    return chunked_loss(hidden, weight, targets, softmax_gradient_)


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, softmax_gradient_: SoftmaxGradient) -> Tensor:
    """`linear_cross_entropy` with the given work on the logits of a chunk."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedLoss.apply(hidden, weight, targets, softmax_gradient_)
    losses = [softmax_gradient_(logits, targets[chunk]) for chunk, logits in _logits(hidden, weight)]
    return torch.cat(losses).mean()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softmax_gradient_: SoftmaxGradient) -> Tensor:
        hidden_gradient, weight_gradient = torch.empty_like(hidden), _Sum(weight)
        losses = []
        for chunk, logits in _logits(hidden, weight):
            losses.append(softmax_gradient_(logits, targets[chunk]))
            torch.mm(logits, weight, out=hidden_gradient[chunk])
            weight_gradient.add_product(logits.t(), hidden[chunk])
        ctx.save_for_backward(hidden_gradient, weight_gradient.rounded())
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scale = scale / len(ctx.saved_tensors[0])
        return *(gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors), None, None


class _Sum:
    """A sum of matrix products in at least float32, shaped like `result`."""

    def __init__(self, like: Tensor):
        self.product = torch.empty_like(like)
        self.total = self.product if like.dtype == exact(like) else torch.empty_like(like, dtype=exact(like))
        self.terms = 0

    def add_product(self, left: Tensor, right: Tensor) -> None:
        beta = min(self.terms, 1)
        self.terms += 1
        if self.total is self.product:
            torch.addmm(self.total, left, right, beta=beta, out=self.total)
        elif left.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
            torch.addmm(self.total, left, right, self.total.dtype, beta=beta, out=self.total)
        else:
            torch.mm(left, right, out=self.product)
            height = max(1, BLOCK_ELEMENTS // right.shape[1])
            for total, product in zip(self.total.split(height), self.product.split(height), strict=True):
                # A sum of two types takes a slow path on CPUs; two passes over a block in the cache do not.
                total.copy_(product) if beta == 0 else total.add_(product.to(total.dtype))

    def rounded(self) -> Tensor:
        """The sum in its matrix's own type."""
        return self.product if self.total is self.product else self.product.copy_(self.total)


def softmax_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """`SoftmaxGradient`, block by block: five passes that a CPU makes in its cache."""
    losses = torch.empty(len(logits), dtype=exact(logits), device=logits.device)
    height = len(logits) if logits.is_cuda else max(1, BLOCK_ELEMENTS // logits.shape[1])
    for part, target, loss in zip(*(t.split(height) for t in (logits, targets[:, None], losses)), strict=True):
        x = part.to(loss.dtype)
        chosen, largest = x.gather(1, target), x.amax(1)
        torch.softmax(x, 1, out=x)
        # log Σ exp(x) from the largest probability, the one that cannot underflow.
        torch.sub(largest - x.amax(1).log(), chosen[:, 0], out=loss)
        x.scatter_(1, target, x.gather(1, target) - 1)
        if x is not part:
            part.copy_(x)
    return losses


def exact(tensor: Tensor) -> torch.dtype:
    """The type that sums over a tensor's elements are kept in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Equal chunks of tokens, and the logits of each in a buffer that the next one overwrites."""
    limit = CUDA_CHUNK_ELEMENTS if hidden.is_cuda else CPU_CHUNK_ELEMENTS
    n_chunks = -(-len(hidden) // max(1, limit // len(weight)))
    size = -(-len(hidden) // n_chunks)
    buffer = hidden.new_empty(size, len(weight))
    for start in range(0, len(hidden), size):
        chunk = slice(start, min(start + size, len(hidden)))
        yield chunk, torch.mm(hidden[chunk], weight.t(), out=buffer[: chunk.stop - start])
