"""AdamW on sampled rows is torch.optim.AdamW, with what happens to the other rows made explicit.

R rows, C columns
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from est_cli.kernels.adamw import Hyperparameters, Move, adamw_step
from est_cli.kernels.pack import CHUNK_ELEMENTS
from kernels.device import largest_allocation

R, C = 23, 7
HYPER = Hyperparameters(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
CLIP = torch.tensor(0.37)


def fresh(rows: int = R, columns: int = C, dtype: torch.dtype = torch.float32) -> Move:
    """A parameter before its first step, of which nothing has a gradient yet."""
    parameter = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Move(parameter, torch.zeros_like(parameter), torch.zeros_like(parameter), [], None, 0, HYPER)


def sampled(step: int, rows: int = R, columns: int = C) -> tuple[np.ndarray, Tensor]:
    """About half of the rows, and their gradient [r, C]."""
    picked = np.sort(np.random.default_rng(step).permutation(rows)[: (rows + 1) // 2])
    gradient = torch.randn(len(picked), columns, generator=torch.Generator().manual_seed(step))
    return picked, gradient


def move(state: Move, gradient: Tensor | None, rows: np.ndarray | None, counts, clip: Tensor | None = None) -> None:
    gradients = [] if gradient is None else list(gradient.split(5))  # in pieces, as the gradients of layers are
    adamw_step([replace(state, gradients=gradients, rows=rows, counts=counts)], clip)


def torch_adamw(*parameters: Tensor, hyper: Hyperparameters = HYPER) -> torch.optim.AdamW:
    betas, rest = (hyper.beta1, hyper.beta2), {"eps": hyper.eps, "weight_decay": hyper.weight_decay}
    return torch.optim.AdamW(parameters, lr=hyper.lr, betas=betas, **rest, fused=True)


@pytest.fixture(params=[1, 3 * C + 2, 10 * C, 1 << 18], ids="chunk-{}".format)
def chunk(request, monkeypatch):
    """From one row at a time to all of them at once."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("which", ["sampled", "all or none"])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["unclipped", "clipped"])
def test_zero_grad_is_torch_adamw_with_explicit_zero_gradients_bit_for_bit(chunk, clip, weight_decay, which):
    """Of each of the two parameters that lie in the matrix: the first ends within a vector register."""
    state = replace(fresh(), hyper=replace(HYPER, weight_decay=weight_decay), ends=[9, R])
    expected = [part.clone() for part in state.parameter.split([9, R - 9])]
    optimizer = torch_adamw(*expected, hyper=state.hyper)
    for step in range(1, 9):
        rows, gradient = sampled(step)
        if which == "all or none":
            whole = torch.randn(R, C, generator=torch.Generator().manual_seed(step))
            rows, gradient = None, whole if step % 3 else None
        full = torch.zeros(R, C)
        if gradient is not None:
            full[slice(None) if rows is None else rows] = gradient * (1 if clip is None else clip)
        for parameter, own in zip(expected, full.split([9, R - 9]), strict=True):
            parameter.grad = own.clone()
        optimizer.step()
        move(state, gradient, rows, step, clip)
    moments = [optimizer.state[parameter] for parameter in expected]
    assert torch.equal(state.parameter, torch.cat(expected))
    assert torch.equal(state.moment, torch.cat([moment["exp_avg"] for moment in moments]))
    assert torch.equal(state.square, torch.cat([moment["exp_avg_sq"] for moment in moments]))


def test_freeze_moves_sampled_rows_by_their_own_counts_and_leaves_every_bit_of_the_others(chunk):
    """As one torch.optim.AdamW per row, which steps when its row is sampled.

    In the last step all rows do: stage 3 after stages that froze rows has no row list, and counts that differ.
    """
    state, counts = fresh(dtype=torch.float64), np.zeros(R, np.int64)
    rows = [row.clone().requires_grad_() for row in state.parameter]
    optimizers = [torch_adamw(row) for row in rows]
    for step in range(1, 13):
        picked, gradient = sampled(step) if step < 12 else (np.arange(R), fresh().parameter)
        for row, row_gradient in zip(picked, gradient.double(), strict=True):
            rows[row].grad = row_gradient * CLIP
            optimizers[row].step()
        counts[picked] += 1
        before = [tensor.clone() for tensor in state.tensors]
        move(state, gradient.double(), picked if step < 12 else None, counts[picked], CLIP)
        torch.testing.assert_close(state.parameter, torch.stack(rows).detach(), rtol=0, atol=1e-12)
        still = np.setdiff1d(np.arange(R), picked)
        assert all(torch.equal(old[still], new[still]) for old, new in zip(before, state.tensors, strict=True))
    assert len(set(counts.tolist())) > 3, "rows with different counts are what this test is about"


@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
def test_nothing_of_the_full_tensors_size_is_allocated(monkeypatch, unsampled):
    rows_total, columns, chunk = 512, 16, 256
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", chunk)
    state = fresh(rows_total, columns)
    rows, gradient = sampled(1, rows_total, columns)
    counts = np.arange(1, len(gradient) + 1)
    counts = counts if unsampled == "freeze" else 1
    assert 0 < largest_allocation(lambda: move(state, gradient, rows, counts, CLIP)) <= chunk * 4
