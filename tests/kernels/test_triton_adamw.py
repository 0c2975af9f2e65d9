"""Triton's AdamW against float64: its error is at most twice that of torch's float32 version."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from est_cli.benchmark.kernel_cases import adamw_case, copied
from est_cli.benchmark.kernel_checks import ALIGNED, ODD, SETS, check_adamw
from est_cli.kernels import adamw, triton_adamw
from est_cli.kernels.dispatch import triton_kernels
from kernels.device import DEVICE

TENSORS = ("parameter", "moment", "square")


@pytest.mark.parametrize("matrices", SETS.values(), ids=SETS)
@pytest.mark.parametrize("clip", [None, 0.37], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("freeze", [False, True], ids=["zero_grad", "freeze"])
def test_steps_are_as_close_to_the_truth_as_torchs(matrices, clip, freeze):
    for check in check_adamw(triton_kernels(), matrices, freeze, clip, DEVICE):
        assert check.passed, check


def test_frozen_rows_and_their_moments_are_untouched_bit_for_bit():
    moves = adamw_case(ODD + ALIGNED, True, DEVICE)
    before = copied(moves, torch.float32)
    triton_adamw.adamw_step(moves, None)
    assert any(move.rows is not None for move in moves)
    for old, new in zip(before, moves, strict=True):
        sampled = torch.zeros(len(new.parameter), dtype=torch.bool, device=DEVICE)
        sampled[slice(None) if new.rows is None else new.rows.device] = True
        for name in TENSORS:
            assert torch.equal(getattr(old, name)[~sampled], getattr(new, name)[~sampled])
            assert (getattr(old, name)[sampled] != getattr(new, name)[sampled]).any(dim=1).all()


def test_zero_grad_moves_rows_without_a_gradient_as_a_gradient_of_zero_does():
    moves = adamw_case(ODD + ALIGNED, False, DEVICE)
    explicit = []
    for move in copied(moves, torch.float32):
        gradient = torch.zeros_like(move.parameter)
        if move.gradients:
            gradient[slice(None) if move.rows is None else move.rows.device] = move.gradients[0]
        explicit.append(replace(move, gradients=[gradient], rows=None))
    triton_adamw.adamw_step(moves, None)
    triton_adamw.adamw_step(explicit, None)
    for sampled, whole in zip(moves, explicit, strict=True):
        for name in TENSORS:
            assert torch.equal(getattr(sampled, name), getattr(whole, name))


def test_rows_that_joined_late_step_beside_tensors_whose_rows_all_have_one_count():
    """zero_grad after a growth of heads: some moves have a count, others one for every row."""
    moves = adamw_case(ODD, False, DEVICE)
    late = adamw_case(ALIGNED[3:4], True, DEVICE)
    late = [replace(m, counts=np.arange(1, 1 + len(m.parameter))) for m in late]
    both = [*moves[:3], *late, *moves[3:]]
    found, usual = copied(both, torch.float32), copied(both, torch.float32)
    triton_adamw.adamw_step(found, None)
    adamw.adamw_step(usual, None)
    for ours, theirs in zip(found, usual, strict=True):
        for name in TENSORS:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("freeze", [False, True], ids=["zero_grad", "freeze"])
def test_the_device_refuses_a_step(freeze):
    moves = adamw_case(ODD + ALIGNED, freeze, DEVICE)
    before = copied(moves, torch.float32)
    triton_adamw.adamw_step(moves, torch.tensor(torch.nan, device=DEVICE), torch.ones((), device=DEVICE))
    for old, new in zip(before, moves, strict=True):
        assert all(torch.equal(getattr(old, name), getattr(new, name)) for name in TENSORS)
    triton_adamw.adamw_step(moves, None, torch.zeros((), device=DEVICE))
    triton_adamw.adamw_step(before, None)
    for old, new in zip(before, moves, strict=True):
        assert all(torch.equal(getattr(old, name), getattr(new, name)) for name in TENSORS)


def test_nothing_to_move_is_no_error():
    triton_adamw.adamw_step([], None)
