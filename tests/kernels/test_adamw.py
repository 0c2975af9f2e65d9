"""AdamW on sampled rows is torch.optim.AdamW, with what happens to the other rows made explicit.

R rows, C columns
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from est_cli.kernels import adamw as kernel
from est_cli.kernels.adamw import Hyperparameters, Move, Rows, adamw_step
from kernels.allocations import Allocations

R, C = 23, 7
HYPER = Hyperparameters(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
PLAIN = Hyperparameters(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
CLIP = torch.tensor(0.37)


@dataclass
class State:
    """A parameter with its moments, and how many steps each row has taken."""

    parameter: Tensor
    moment: Tensor
    square: Tensor
    counts: np.ndarray

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parameter, self.moment, self.square


def fresh(rows: int = R, columns: int = C, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(rows, columns, generator=generator).to(dtype)
    return State(parameter, torch.zeros_like(parameter), torch.zeros_like(parameter), np.zeros(rows, np.int64))


def sampled(step: int, rows: int = R, columns: int = C) -> tuple[Rows, Tensor]:
    """About half of the rows, and their gradient [r, C]."""
    host = np.sort(np.random.default_rng(step).permutation(rows)[: (rows + 1) // 2])
    gradient = torch.randn(len(host), columns, generator=torch.Generator().manual_seed(step))
    return Rows(host, torch.from_numpy(host)), gradient


def step_rows(state: State, gradient: Tensor | None, rows: Rows | None, hyper: Hyperparameters, clip, counts) -> None:
    gradients = [] if gradient is None else list(gradient.split(5))  # in pieces, as the gradients of layers are
    adamw_step([Move(*state.tensors, gradients, rows, counts, hyper)], clip)


def torch_adamw(parameter: Tensor, hyper: Hyperparameters = HYPER) -> torch.optim.AdamW:
    betas = (hyper.beta1, hyper.beta2)
    return torch.optim.AdamW(
        [parameter], lr=hyper.lr, betas=betas, eps=hyper.eps, weight_decay=hyper.weight_decay, fused=True
    )


@pytest.fixture(params=[1, 3 * C + 2, 10 * C, 1 << 18], ids="chunk-{}".format)
def chunk(request, monkeypatch):
    """From one row at a time to all of them at once."""
    monkeypatch.setattr(kernel, "CPU_CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("which", ["sampled", "all or none"])
@pytest.mark.parametrize("hyper", [HYPER, PLAIN], ids=["decayed", "not-decayed"])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["unclipped", "clipped"])
def test_zero_grad_is_torch_adamw_with_explicit_zero_gradients_bit_for_bit(chunk, clip, hyper, which):
    state, expected = fresh(), fresh().parameter.clone().requires_grad_()
    optimizer = torch_adamw(expected, hyper)
    for step in range(1, 9):
        rows, gradient = sampled(step)
        if which == "all or none":
            whole = torch.randn(R, C, generator=torch.Generator().manual_seed(step))
            rows, gradient = None, whole if step % 3 else None
        expected.grad = torch.zeros_like(expected)
        if gradient is not None:
            expected.grad[slice(None) if rows is None else rows.device] = gradient * (1 if clip is None else clip)
        optimizer.step()
        step_rows(state, gradient, rows, hyper, clip, step)
    moments = optimizer.state[expected]
    assert torch.equal(state.parameter, expected)
    assert torch.equal(state.moment, moments["exp_avg"])
    assert torch.equal(state.square, moments["exp_avg_sq"])


def test_zero_grad_moves_unsampled_rows_on_decay_and_momentum(chunk):
    state = fresh()
    for step in (1, 2):
        rows, gradient = sampled(0)
        before = state.parameter.clone()
        step_rows(state, gradient if step == 1 else None, rows if step == 1 else None, HYPER, None, step)
        moved = (state.parameter != before).any(dim=1)
        assert moved.all(), "decay moves every row, sampled or not"
    others = np.setdiff1d(np.arange(R), rows.host)
    assert state.moment[rows.device].any(dim=1).all()
    assert not state.moment[others].any()


def freeze_step(state: State, step: int, clip: Tensor | None) -> np.ndarray:
    """One step on sampled rows; returns their indices."""
    rows, gradient = sampled(step, *state.parameter.shape)
    state.counts[rows.host] += 1
    step_rows(state, gradient.to(state.parameter), rows, HYPER, clip, state.counts[rows.host])
    return rows.host


def test_freeze_leaves_unsampled_rows_and_moments_untouched_bit_for_bit(chunk):
    state = fresh()
    for step in range(1, 7):
        before = [tensor.clone() for tensor in state.tensors]
        moved = freeze_step(state, step, CLIP)
        still = np.setdiff1d(np.arange(R), moved)
        for old, new in zip(before, state.tensors, strict=True):
            assert torch.equal(old[still], new[still])
            assert (old[moved] != new[moved]).any(dim=1).all()


def test_freeze_corrects_every_rows_bias_by_its_own_count(chunk):
    """One torch.optim.AdamW per row, which steps when its row is sampled."""
    state = fresh(dtype=torch.float64)
    rows = [row.clone().requires_grad_() for row in state.parameter]
    optimizers = [torch_adamw(row) for row in rows]
    for step in range(1, 12):
        picked, gradient = sampled(step)
        for row, row_gradient in zip(picked.host, gradient, strict=True):
            rows[row].grad = row_gradient.double() * CLIP
            optimizers[row].step()
        freeze_step(state, step, CLIP)
    assert len(set(state.counts.tolist())) > 3, "rows with different counts are what this test is about"
    torch.testing.assert_close(state.parameter, torch.stack(rows).detach(), rtol=0, atol=1e-12)


def test_rows_keep_their_own_counts_where_all_of_them_step(chunk):
    """Stage 3 after stages that froze rows: no row list, and counts that differ."""
    state = fresh(dtype=torch.float64)
    for step in range(1, 6):
        freeze_step(state, step, None)
    rows = [row.clone().requires_grad_() for row in state.parameter]
    gradient = torch.randn(R, C, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for index, row in enumerate(rows):
        optimizer = torch_adamw(row)
        moments = {"exp_avg": state.moment[index].clone(), "exp_avg_sq": state.square[index].clone()}
        optimizer.state[row] = {"step": torch.tensor(float(state.counts[index])), **moments}
        row.grad = gradient[index]
        optimizer.step()
    state.counts += 1
    step_rows(state, gradient, None, HYPER, None, state.counts)
    torch.testing.assert_close(state.parameter, torch.stack(rows).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
def test_nothing_of_the_full_tensors_size_is_allocated(monkeypatch, unsampled):
    rows_total, columns, chunk = 512, 16, 256
    monkeypatch.setattr(kernel, "CPU_CHUNK_ELEMENTS", chunk)
    state = fresh(rows_total, columns)
    rows, gradient = sampled(1, rows_total, columns)
    counts = np.arange(1, len(gradient) + 1)
    with Allocations([*state.tensors, gradient, rows.device]) as allocations:
        step_rows(state, gradient, rows, HYPER, CLIP, counts if unsampled == "freeze" else 1)
    assert 0 < allocations.largest <= chunk
