"""Triton's fused head against float64: its errors are at most twice the plain path's."""

import pytest
import torch

from est_cli.benchmark.kernel_cases import head_case, loss_and_gradients
from est_cli.benchmark.kernel_checks import HEADS, check_loss
from est_cli.kernels import linear_cross_entropy as chunked
from est_cli.kernels import triton_linear_cross_entropy as kernel
from est_cli.kernels.dispatch import triton_kernels
from est_cli.kernels.triton_linear_cross_entropy import BLOCK, linear_cross_entropy
from kernels.device import DEVICE, HAS_GPU

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]


def test_the_shapes_that_are_checked_have_less_than_a_block_exactly_one_and_more():
    vocabularies = [vocabulary for *_, vocabulary in HEADS]
    assert BLOCK in vocabularies and min(vocabularies) < BLOCK < max(vocabularies) and max(vocabularies) % BLOCK


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_are_as_close_to_the_truth_as_the_plain_paths(shape, dtype):
    for check in check_loss(triton_kernels(), shape, dtype, DEVICE):
        assert check.passed, check
    ours = loss_and_gradients(linear_cross_entropy, *head_case(*shape, dtype, DEVICE))
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]


@pytest.mark.parametrize("tokens", [1, 5, 36])
def test_chunks_of_any_size_add_up(tokens, monkeypatch):
    inputs = head_case(37, 13, 101, torch.float32, DEVICE)
    whole = loss_and_gradients(linear_cross_entropy, *inputs)
    monkeypatch.setattr(chunked, "CUDA_CHUNK_ELEMENTS" if HAS_GPU else "CPU_CHUNK_ELEMENTS", tokens * 101)
    for a, b in zip(loss_and_gradients(linear_cross_entropy, *inputs), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_without_gradients_the_loss_is_the_same():
    inputs = head_case(37, 13, 101, torch.float32, DEVICE)
    with torch.no_grad():
        loss = linear_cross_entropy(*inputs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(*inputs).detach(), rtol=0, atol=1e-6)


def test_targets_may_be_a_view_with_gaps():
    hidden, weight, _ = head_case(6, 4, 9, torch.float32, DEVICE)
    windows = torch.arange(12, device=DEVICE) % 9
    gapped = windows[::2]
    assert not gapped.is_contiguous()
    assert torch.equal(
        linear_cross_entropy(hidden, weight, gapped), linear_cross_entropy(hidden, weight, gapped.clone())
    )


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], device=DEVICE)
    losses = kernel.softmax_gradient_(logits, torch.tensor([1, 0], device=DEVICE))
    torch.testing.assert_close(losses.cpu(), torch.tensor([2e4, 1.0986123]))
    torch.testing.assert_close(logits.cpu(), torch.tensor([[1.0, -1.0, 0.0], [-2 / 3, 1 / 3, 1 / 3]]))
