"""Triton's kernels at the sizes of GPT-2 on a real GPU, against float64; test_triton_*.py have the odd shapes.

`python -m est_cli.benchmark.kernels` times what is tested here.
"""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from est_cli.benchmark.arguments import PRESETS
from est_cli.benchmark.kernel_cases import (
    adamw_case,
    head_case,
    loss_and_gradients,
    model_matrices,
    pack_case,
)
from est_cli.benchmark.kernel_checks import check_adamw, check_loss, check_pack
from est_cli.config import ModelConfig
from est_cli.kernels import linear_cross_entropy as chunked
from est_cli.kernels.dispatch import TORCH, kernels_for, triton_kernels
from est_cli.subnet.schedule import Rates
from kernels.device import DEVICE, HAS_GPU

pytestmark = [
    pytest.mark.skipif(not HAS_GPU, reason="no GPU"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

GPT2 = replace(ModelConfig(**PRESETS["gpt2"]), n_layers=2)
HALF = Rates(0.5, 0.5, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rates", [HALF, Rates()], ids=["half", "full"])
def test_packed_slots_equal_those_that_torch_fills(rates, dtype):
    for check in check_pack(triton_kernels(), model_matrices(GPT2, rates), dtype, DEVICE):
        assert check.passed, check


@pytest.mark.parametrize("freeze", [False, True], ids=["zero_grad", "freeze"])
def test_an_adamw_step_is_as_close_to_the_truth_as_torchs(freeze):
    for check in check_adamw(triton_kernels(), model_matrices(GPT2, HALF), freeze, 0.37, DEVICE):
        assert check.passed, check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [100, 1000])
def test_the_loss_is_as_close_to_the_truth_as_the_plain_path(dtype, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CUDA_CHUNK_ELEMENTS", chunk * GPT2.vocab_size)
    for kernels in (TORCH, triton_kernels()):
        for check in check_loss(kernels, (999, GPT2.d_model, GPT2.vocab_size), dtype, DEVICE):
            assert check.passed, check


@pytest.mark.parametrize("version", ["torch", "triton"])
def test_no_kernel_waits_for_the_gpu(version):
    """Work that would wait raises under this debug mode."""
    kernels, clip = kernels_for(version, DEVICE), torch.tensor(0.37, device=DEVICE)
    matrices = model_matrices(GPT2, HALF)
    packing, moves = pack_case(matrices, torch.bfloat16, DEVICE), adamw_case(matrices, False, DEVICE)
    head = head_case(256, GPT2.d_model, GPT2.vocab_size, torch.bfloat16, DEVICE)
    for mode in ("default", "error"):  # the first turn compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            kernels.gather_rows(packing.sources, packing.rows, packing.slots)
            kernels.adamw_step(moves, clip)
            loss_and_gradients(kernels.linear_cross_entropy, *head)
        finally:
            torch.cuda.set_sync_debug_mode("default")
