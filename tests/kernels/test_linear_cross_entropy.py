"""The fused head equals F.linear and F.cross_entropy, and never holds the logits as a whole.

N tokens, D d_model, V vocabulary
"""

import pytest
import torch
from torch import Tensor

from est_cli.benchmark.kernels import check_loss, head_case, loss_and_gradients, plain_loss
from est_cli.kernels.dispatch import TORCH
from est_cli.kernels.linear_cross_entropy import linear_cross_entropy
from est_cli.subnet.memory import CHUNK_LOGITS
from kernels.device import largest_allocation

N, D, V = 37, 13, 101
evaluated = torch.no_grad()(linear_cross_entropy)


def head_input(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return head_case(N, D, V, dtype, torch.device("cpu"))


@pytest.fixture(params=[1, 5, 36, N, 1000], ids="{}-tokens-a-chunk".format)
def chunk(request, monkeypatch):
    """Chunks that divide N, that leave a rest, and one that is larger than all."""
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", request.param * V + V // 2)
    return request.param


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradients_equal_the_plain_path(chunk, dtype, tolerance, scale):
    found = loss_and_gradients(linear_cross_entropy, *head_input(dtype), scale=scale)
    expected = loss_and_gradients(plain_loss, *head_input(torch.float64), scale=scale)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(N, D, V), (5, 7, 11), (64, 3, 999)])
def test_low_precision_is_as_close_to_the_truth_as_the_plain_path(chunk, shape, dtype):
    for check in check_loss(TORCH, shape, dtype, torch.device("cpu")):
        assert check.passed, check
    found = loss_and_gradients(linear_cross_entropy, *head_case(*shape, dtype, torch.device("cpu")))
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_gradients_the_loss_is_the_same(chunk, dtype):
    hidden, weight, targets = head_input(dtype)
    expected = linear_cross_entropy(hidden, weight, targets).detach()
    for found in (linear_cross_entropy(hidden.detach(), weight.detach(), targets), evaluated(hidden, weight, targets)):
        assert torch.equal(found, expected)
        assert not found.requires_grad


@pytest.mark.parametrize("gradients", [True, False])
def test_the_logits_never_exist_as_a_whole(monkeypatch, gradients):
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 5 * V)

    def largest(function) -> int:
        inputs = [tensor.detach().requires_grad_(gradients and tensor.is_floating_point()) for tensor in head_input()]
        return largest_allocation(lambda: function(*inputs).backward() if gradients else function(*inputs)) // 4

    assert largest(plain_loss) == N * V
    assert largest(linear_cross_entropy) <= V * D < N * V


def test_large_logits_do_not_overflow():
    hidden, weight, targets = head_input(torch.float32)
    hidden = (300 * hidden.detach()).requires_grad_()
    found, expected = (loss_and_gradients(f, hidden, weight, targets) for f in (linear_cross_entropy, plain_loss))
    assert all(ours.isfinite().all() for ours in found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_token_whose_target_is_certain_costs_nothing():
    weight = torch.eye(4, dtype=torch.float64)
    hidden = 1000.0 * weight[[2, 0]]
    assert linear_cross_entropy(hidden, weight, torch.tensor([2, 0])) == 0.0
