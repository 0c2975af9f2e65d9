"""The LM head and its loss in one operation over chunks of tokens: the full logits never exist.

The forward pass also computes both gradients, which need the same softmax: 6·D·V FLOPs a token, as an ordinary forward
and backward pass. A chunk's logits are overwritten by their gradient.

N tokens, D d_model, V vocabulary
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from est_cli.subnet.memory import CHUNK_LOGITS

ROW_MULTIPLE = 64
"""Matrix products are slower if a chunk is no multiple of their tiles."""
CPU_BLOCK_ELEMENTS = 2 << 20
"""Elements that stay in the cache over several passes."""

_HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.addmm.overloads()
"""Whether a product of low-precision matrices can be added to a float32 one (torch 2.8, CUDA only)."""

SoftmaxGradient = Callable[[Tensor, Tensor], Tensor]
"""(logits [n, V], targets [n]) → losses [n]; the logits become softmax − onehot, the gradient of their sum."""


def softmax_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """`SoftmaxGradient` in PyTorch."""
    losses = torch.empty(len(logits), dtype=sum_dtype(logits), device=logits.device)
    if logits.dtype == losses.dtype:
        _softmax_gradient_into(losses, logits, targets)
        return losses
    for x, part, target, loss in _cast_blocks(logits, targets, losses):
        _softmax_gradient_into(loss, x, target)
        part.copy_(x)
    return losses


def _softmax_gradient_into(losses: Tensor, x: Tensor, targets: Tensor) -> None:
    """x, of the type of the losses, becomes softmax − onehot."""
    target = targets[:, None]
    chosen, largest = x.gather(1, target)[:, 0], x.amax(1)
    torch.softmax(x, 1, out=x)
    # log Σ exp(x) from the largest probability, the one that cannot underflow.
    torch.sub(largest - chosen, x.amax(1).log(), out=losses)
    x.scatter_(1, target, x.gather(1, target) - 1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softmax_gradient_: SoftmaxGradient = softmax_gradient_
) -> Tensor:
    """Mean cross-entropy in nats, as a scalar in at least float32.

    hidden [N, D], weight [V, D], targets [N] of int64 below V.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedLoss.apply(hidden, weight, targets, softmax_gradient_)
    losses = [softmax_gradient_(logits, targets[chunk]) for chunk, logits in _logits(hidden, weight)]
    return torch.cat(losses).mean()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softmax_gradient_: SoftmaxGradient) -> Tensor:
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight, dtype=sum_dtype(weight))
        losses = []
        for chunk, logits in _logits(hidden, weight):
            losses.append(softmax_gradient_(logits, targets[chunk]))
            torch.mm(logits, weight, out=hidden_gradient[chunk])
            _add_product(weight_gradient, logits.t(), hidden[chunk], is_first=chunk.start == 0)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtype = weight.dtype
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = scale / len(hidden_gradient)
        hidden_gradient = (hidden_gradient.to(scale.dtype) * scale).to(ctx.dtype)
        if weight_gradient.dtype == ctx.dtype:
            # Autograd sees that this changes what it saved: a second backward of the same graph raises.
            return hidden_gradient, weight_gradient.mul_(scale), None, None
        rounded = torch.empty_like(weight_gradient, dtype=ctx.dtype)
        for part, gradient in _blocks(rounded, weight_gradient):
            part.copy_(gradient * scale)
        return hidden_gradient, rounded, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """total += left · right, in total's type; total = left · right for the first product."""
    beta = 0 if is_first else 1
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif left.is_cuda and _HAS_OUT_DTYPE:
        torch.addmm(total, left, right, total.dtype, beta=beta, out=total)
    else:
        # Adding tensors of two types is slow on a CPU, so each block is cast in the cache first.
        for product, _, block in _cast_blocks(torch.mm(left, right), total):
            block.copy_(product) if is_first else block.add_(product)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which sums over a tensor's elements are kept."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Equal chunks of tokens, and the logits of each in a buffer that the next one overwrites."""
    limit = max(1, CHUNK_LOGITS[hidden.device.type] // len(weight))
    multiple = ROW_MULTIPLE if limit >= ROW_MULTIPLE else 1
    limit = limit // multiple * multiple
    n_chunks = -(-len(hidden) // limit)
    size = -(-len(hidden) // (n_chunks * multiple)) * multiple
    buffer = hidden.new_empty(min(size, len(hidden)), len(weight))
    for start in range(0, len(hidden), size):
        chunk = slice(start, min(start + size, len(hidden)))
        yield chunk, torch.mm(hidden[chunk], weight.t(), out=buffer[: chunk.stop - start])


def _cast_blocks(low: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of all tensors, and before them a copy of `low`'s in `sum_dtype`; the next block overwrites it."""
    buffer = torch.empty_like(low[: _block_height(low)], dtype=sum_dtype(low))
    for part, *rest in _blocks(low, *others):
        yield buffer[: len(part)].copy_(part), part, *rest


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the tensors that stay in a CPU's cache together; all rows on a GPU."""
    height = _block_height(tensors[0])
    return zip(*(tensor.split(height) for tensor in tensors), strict=True)


def _block_height(tensor: Tensor) -> int:
    rows, columns = tensor.shape
    return rows if tensor.is_cuda else min(rows, max(1, CPU_BLOCK_ELEMENTS // columns))
