"""Triton's pack is an exact copy of the rows, rounded as torch rounds."""

import pytest
import torch

from est_cli.benchmark.kernel_cases import Matrix, PackCase, pack_case
from est_cli.benchmark.kernel_checks import SETS, check_pack
from est_cli.kernels import triton_pack
from est_cli.kernels.dispatch import triton_kernels
from kernels.device import DEVICE, HAS_GPU

DTYPES = [torch.float16, *([torch.bfloat16] if HAS_GPU else [])]


@pytest.mark.parametrize("matrices", SETS.values(), ids=SETS)
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_slots_equal_those_that_torch_fills(matrices, dtype):
    for check in check_pack(triton_kernels(), matrices, dtype, DEVICE):
        assert check.passed, check


def test_indices_may_start_at_any_address():
    """All indices travel in one tensor, so that most parts of it are not aligned."""
    indices = torch.tensor([9, 0, 2, 4], device=DEVICE)[1:]
    case = PackCase([torch.randn(5, 32, device=DEVICE)], [indices], [torch.empty(3, 32, device=DEVICE)])
    triton_pack.gather_rows(case.sources, case.rows, case.slots)
    assert torch.equal(case.slots[0], case.sources[0][[0, 2, 4]])


def test_matrices_may_start_at_any_address():
    source, slot = torch.randn(1 + 5 * 32, device=DEVICE), torch.empty(3 + 2 * 32, device=DEVICE)
    rows = torch.tensor([1, 4], device=DEVICE)
    triton_pack.gather_rows([source[1:].view(5, 32)], [rows], [slot[3:].view(2, 32)])
    assert torch.equal(slot[3:].view(2, 32), source[1:].view(5, 32)[rows])


def test_more_matrices_than_one_power_of_two():
    matrices = [Matrix(3 + number, 16, 2) for number in range(37)]
    case = pack_case(matrices, torch.float32, DEVICE)
    triton_pack.gather_rows(case.sources, case.rows, case.slots)
    for source, rows, slot in zip(case.sources, case.rows, case.slots, strict=True):
        assert torch.equal(slot, source[rows])


def test_nothing_to_pack_is_no_error():
    triton_pack.gather_rows([], [], [])
