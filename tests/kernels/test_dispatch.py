"""Which version of the kernels a choice means, and where it is refused."""

from dataclasses import replace

import pytest
import torch
from tiny import LLAMA, random_master, train_config

from est_cli.benchmark.case import PRESETS
from est_cli.benchmark.kernels import adamw_case, head_case, loss_and_gradients, model_matrices, pack_case
from est_cli.errors import UserError
from est_cli.kernels.dispatch import TORCH, kernels_for
from est_cli.subnet.plan import subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.training.device import available_device
from est_cli.training.optimizer import SampledAdamW
from est_cli.training.subnetwork import PackedSubnetwork
from kernels.device import DEVICE, HAS_GPU


def test_triton_on_a_cpu_is_refused_before_anything_is_made_and_every_other_choice_is_pytorchs():
    trainer = train_config(device="cpu").trainer
    with pytest.raises(UserError, match=r"^kernels=triton: needs a GPU; allowed here: auto, torch, masked$"):
        available_device(trainer, "triton")
    for choice in ("auto", "torch", "masked"):
        assert available_device(trainer, choice).kind == "cpu"
        assert kernels_for(choice, "cpu") is TORCH


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("est_cli.kernels.dispatch.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package triton, which is not installed"):
        kernels_for("triton", "cuda")


def test_subnetwork_and_optimizer_use_their_models_kernels():
    calls = []

    def watched(name: str):
        return lambda *arguments: calls.append(name) or getattr(TORCH, name)(*arguments)

    model = random_master(LLAMA, torch.float32)
    model.kernels = TORCH._replace(**{name: watched(name) for name in TORCH._fields})
    subnet = PackedSubnetwork(model, subnetwork(LLAMA, train_config().sampling, Rates(0.5, 0.5)), torch.float32)
    optimizer = SampledAdamW(model, train_config().optimizer)
    subnet.load(sample(0, 0, Stage(1, 0, 9, Rates(0.5, 0.5)), LLAMA, train_config().sampling))
    tokens = torch.ones(1, 4, dtype=torch.int64)
    subnet.loss(tokens, tokens).backward()
    optimizer.step(subnet.updates(), 1e-3)
    assert calls == ["gather_rows", "linear_cross_entropy", "adamw_step"]


@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
@pytest.mark.parametrize("version", ["torch", "triton"])
def test_no_kernel_waits_for_the_gpu(version):
    """Work that would wait raises under this debug mode."""
    kernels, clip = kernels_for(version, DEVICE), torch.tensor(0.37, device=DEVICE)
    gpt2 = replace(PRESETS["gpt2"], n_layers=2)
    matrices = model_matrices(gpt2, Rates(0.5, 0.5, 0.5))
    packing, moves = pack_case(matrices, torch.bfloat16, DEVICE), adamw_case(matrices, False, DEVICE)
    head = head_case(256, gpt2.d_model, gpt2.vocab_size, torch.bfloat16, DEVICE)
    for mode in ("default", "error"):  # the first turn compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            kernels.gather_rows(*packing)
            kernels.adamw_step(moves, clip)
            loss_and_gradients(kernels.linear_cross_entropy, *head)
        finally:
            torch.cuda.set_sync_debug_mode("default")
