"""The curvature is that of the explicit Hessian, and noise has the norm that it says and leaves no trace."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, random_master, snapshot
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from est_cli.evaluation.sharpness import hessian_product, largest_eigenvalue, loss_rises
from est_cli.model.transformer import Transformer
from est_cli.training.validation import mean_loss

WINDOWS = np.random.default_rng(0).integers(5, size=(3, 7))


def tiny(family: str) -> Transformer:
    """A hundred weights or two, so that the Hessian fits a test."""
    small = {"n_layers": 1, "n_heads": 2, "n_kv_heads": {"gpt2": 2, "llama": 1}[family], "d_model": 4, "d_ff": 3}
    return random_master(replace(FAMILIES[family], **small, head_dim=2, vocab_size=5, max_seq_len=8))


def explicit_hessian(model: Transformer) -> Tensor:
    """[P, P] of the mean cross-entropy, by differences of gradients."""
    tokens, parameters = torch.from_numpy(WINDOWS), list(model.parameters())
    weights = parameters_to_vector(parameters).detach()

    def gradient(at: Tensor) -> Tensor:
        vector_to_parameters(at, parameters)
        loss = F.cross_entropy(model.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        return parameters_to_vector(torch.autograd.grad(loss, parameters))

    steps = 1e-6 * torch.eye(len(weights), dtype=weights.dtype)
    columns = [(gradient(weights + step) - gradient(weights - step)) / 2e-6 for step in steps]
    vector_to_parameters(weights, parameters)
    return torch.stack(columns)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def hessian(model):
    return explicit_hessian(model)


def start(model: Transformer) -> Tensor:
    size = sum(p.numel() for p in model.parameters())
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("at_once", [2048, 12], ids=["one batch", "batches add up"])
def test_a_product_is_that_of_the_explicit_hessian(model, hessian, monkeypatch, at_once):
    monkeypatch.setattr("est_cli.evaluation.sharpness._TOKENS_AT_ONCE", at_once)
    vector = start(model)
    torch.testing.assert_close(hessian_product(model, WINDOWS)(vector), hessian @ vector)


def test_power_iteration_finds_the_largest_eigenvalue_of_the_hessian(model, hessian):
    found = largest_eigenvalue(hessian_product(model, WINDOWS), start(model), 500)
    expected = torch.linalg.eigvalsh(hessian)[-1].item()
    assert found["settled"]
    assert found["largest_eigenvalue"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "eigenvalues", [(3.0, 1.0, -9.0), (3.0, 1.0, 0.5), (3.0, -2.0, -9.0), (-1.0, -9.0)], ids=lambda values: str(values)
)
def test_the_largest_eigenvalue_is_not_the_largest_in_size(eigenvalues):
    """The first of a diagonal; each direction has a share in the start."""
    matrix = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    ones = torch.ones(len(eigenvalues), dtype=torch.float64)
    found = largest_eigenvalue(lambda vector: matrix @ vector, ones, 200)
    assert found["largest_eigenvalue"] == pytest.approx(eigenvalues[0], rel=0.05)
    assert found["residual"] < 0.1 * abs(eigenvalues[0])
    assert not largest_eigenvalue(lambda vector: matrix @ vector, ones, 1)["settled"], "too few iterations are said"


def test_noise_has_the_norm_that_it_says_in_every_tensor_and_goes_away(model):
    weights, seen = snapshot(model), []

    def loss() -> float:
        changes = [(p - weights[name]).norm() / weights[name].norm() for name, p in model.named_parameters()]
        seen.append([change.item() for change in changes])
        return mean_loss(model, WINDOWS, 2)

    (small, large) = loss_rises(model, loss, (0.01, 0.3), draws=3, seed=0)
    assert seen[0] == [0.0] * len(weights)
    assert [row for relative in seen[1:4] for row in relative] == pytest.approx([0.01] * 3 * len(weights))
    assert [row for relative in seen[4:] for row in relative] == pytest.approx([0.3] * 3 * len(weights))
    total = torch.cat([w.flatten() for w in weights.values()]).norm().item()
    assert (small["norm"], large["norm"]) == (pytest.approx(0.01 * total), pytest.approx(0.3 * total))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_rise_is_the_loss_with_the_noise_minus_the_loss_without():
    model, losses = tiny("llama"), iter([5.0, 5.5, 6.0, 4.0, 9.0])
    assert [rise["rises"] for rise in loss_rises(model, lambda: next(losses), (0.1, 0.2), 2, 0)] == [
        [0.5, 1.0],
        [-1.0, 4.0],
    ]
