"""Packed and masked subnetworks are EST as the reference spells it out: loss, gradients, and trained weights."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
from adapter import assert_only_sampled, full_size, matrices, reference_plan, reference_tensors, sizes
from reference import ReferenceAdamW, clip, loss_and_gradients
from tiny import GPT2, random_batch, random_master, snapshot
from torch import Tensor

from est_cli.config import ModelConfig, OptimizerConfig, SamplingConfig
from est_cli.subnet.plan import Plan, Subnetwork, subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, StageSpec, build_stages, stage_at
from est_cli.training.optimizer import SampledAdamW, learning_rate
from est_cli.training.subnetwork import MaskedSubnetwork, PackedSubnetwork

EXECUTIONS = [PackedSubnetwork, MaskedSubnetwork]
COMBINATIONS = {
    "+".join(name for name, rate in vars(rates).items() if rate < 1): rates
    for rates in (Rates(*three) for three in product((0.5, 1.0), repeat=3))
    if rates != Rates()
}
HEADS = {"mha": (4, 4), "group": (6, 3), "query": (6, 2)}
ARCHITECTURES = list(product(HEADS, ("gelu", "swiglu"), (True, False)))


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    sampling: SamplingConfig
    rates: Rates

    @property
    def shape(self) -> Subnetwork:
        return subnetwork(self.model, self.sampling, self.rates)


def make_case(attention: str, mlp: str, tied: bool, combination: str) -> Case:
    """The other settings follow from these, each in both its values: GPT-2, Llama, and mixtures of them."""
    n_heads, n_kv_heads = HEADS[attention]
    model = replace(
        GPT2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=4,
        d_model=10,
        d_ff=8,
        vocab_size=11,
        norm="layernorm" if mlp == "gelu" else "rmsnorm",
        position="learned" if attention == "mha" and mlp == "gelu" else "rope",
        mlp=mlp,
        bias=mlp == "gelu" or tied,
        tie_embeddings=tied,
        rope_theta=500.0,
    )
    sampling = SamplingConfig(
        mlp_block=2 if tied else 1,
        gqa="query" if attention == "query" else "group",
        rescale_layers=tied == (mlp == "swiglu"),
    )
    return Case(model, sampling, COMBINATIONS[combination])


def scattered_plan(case: Case) -> Plan:
    """A plan that is no prefix in any sampled dimension: wrong rows could not pass for right ones."""
    (stage,) = build_stages([StageSpec(None, **vars(case.rates))], 100)
    for step in range(stage.end):
        plan = sample(0, step, stage, case.model, case.sampling)
        kept = (plan.layers, *plan.heads, *plan.neurons)
        totals = (case.model.n_layers, *[case.model.n_heads] * len(plan.heads), *[case.model.d_ff] * len(plan.heads))
        if all(len(units) == total or units[-1] >= len(units) for units, total in zip(kept, totals, strict=True)):
            return plan
    raise AssertionError("no plan without a prefix")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name in expected:
        difference = (found[name] - expected[name]).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize(("attention", "mlp", "tied"), ARCHITECTURES)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_loss_and_every_gradient_equal_the_reference(execution, attention, mlp, tied, combination):
    case = make_case(attention, mlp, tied, combination)
    master, plan = random_master(case.model), scattered_plan(case)
    weights, (inputs, targets) = snapshot(master), random_batch(case.model)
    subnet = execution(master, case.shape, torch.float64)
    subnet.load(plan)
    loss = subnet.loss(inputs, targets)
    loss.backward()

    kept = reference_plan(plan)
    found = assert_only_sampled(reference_tensors(case.model, full_size(subnet.updates(), weights)), kept)
    expected_loss, expected = loss_and_gradients(
        sizes(case.model), reference_tensors(case.model, weights), kept, inputs, targets, case.sampling.rescale_layers
    )
    assert abs(loss.item() - expected_loss.item()) <= 1e-10
    assert_close(found, expected, 1e-10)
    for name, parameter in master.named_parameters():
        assert torch.equal(parameter, weights[name]), f"{name} moved without an optimizer step"


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_micro_batches_add_up_to_the_gradient_of_their_mean_loss(execution):
    case = make_case("group", "swiglu", False, "heads+mlp+layers")
    master, plan = random_master(case.model), scattered_plan(case)
    inputs, targets = random_batch(case.model, batch=6)
    subnet = execution(master, case.shape, torch.float64)
    subnet.load(plan)
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        (subnet.loss(inputs[part], targets[part]) / 3).backward()
    found = reference_tensors(case.model, full_size(subnet.updates(), snapshot(master)))
    _, expected = loss_and_gradients(
        sizes(case.model), reference_tensors(case.model, snapshot(master)), reference_plan(plan), inputs, targets, False
    )
    assert_close({name: gradient.nan_to_num() for name, gradient in found.items()}, expected, 1e-10)


def test_a_masked_run_loses_nothing_by_dropping_unsampled_gradients():
    """What `updates` leaves out is exactly zero in the full model's own gradients."""
    case = make_case("group", "swiglu", False, "heads+mlp+layers")
    master, plan = random_master(case.model), scattered_plan(case)
    subnet = MaskedSubnetwork(master, case.shape, torch.float64)
    subnet.load(plan)
    subnet.loss(*random_batch(case.model)).backward()
    whole = {name: parameter.grad for name, parameter in master.named_parameters()}
    touched = full_size(subnet.updates(), snapshot(master))
    for name, gradient in whole.items():
        assert torch.equal(gradient, touched[name].nan_to_num(nan=0.0)), name


STEPS = 20
OPTIMIZER = OptimizerConfig(lr=5e-3, weight_decay=0.1, grad_clip=0.5, warmup=4)


def training_case(index: int, combination: str) -> tuple[Case, list[Plan]]:
    """Twelve steps of sampling, four of heads and MLP alone, four of the full model."""
    case = make_case(*ARCHITECTURES[(5 * index) % len(ARCHITECTURES)], combination)
    case = replace(case, sampling=replace(case.sampling, resample_every=1 + index % 2))
    rates = case.rates
    stages = build_stages([StageSpec(12, **vars(rates)), StageSpec(16, rates.heads, rates.mlp), StageSpec()], STEPS)
    plans = [sample(index, step, stage_at(stages, step), case.model, case.sampling) for step in range(STEPS)]
    return case, plans


@cache
def reference_run(index: int, combination: str, unsampled: str) -> dict[str, Tensor]:
    case, plans = training_case(index, combination)
    start = reference_tensors(case.model, snapshot(random_master(case.model)))
    weights = {name: tensor.clone() for name, tensor in start.items()}
    optimizer = ReferenceAdamW(
        weights, OPTIMIZER.lr, OPTIMIZER.betas, OPTIMIZER.eps, OPTIMIZER.weight_decay, matrices(weights), unsampled
    )
    for step, plan in enumerate(plans):
        kept, (inputs, targets) = reference_plan(plan), random_batch(case.model, seed=step)
        optimizer.lr = learning_rate(OPTIMIZER, step, STEPS)
        rescale_layers = case.sampling.rescale_layers
        _, gradients = loss_and_gradients(sizes(case.model), weights, kept, inputs, targets, rescale_layers)
        assert clip(gradients, OPTIMIZER.grad_clip) > OPTIMIZER.grad_clip, "clipping must be at work in this test"
        optimizer.step(gradients, kept, sizes(case.model))
    return weights


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize(("index", "combination"), list(enumerate(COMBINATIONS)))
def test_weights_after_twenty_steps_equal_the_reference(index, combination, unsampled, execution):
    case, plans = training_case(index, combination)
    master = random_master(case.model)
    optimizer = SampledAdamW(master, replace(OPTIMIZER, unsampled=unsampled))
    subnet, shape = None, None
    for step, plan in enumerate(plans):
        rates = case.rates if step < 12 else replace(case.rates, layers=1.0) if step < 16 else Rates()
        if subnetwork(case.model, case.sampling, rates) != shape:
            shape = subnetwork(case.model, case.sampling, rates)
            subnet = execution(master, shape, torch.float64)
        inputs, targets = random_batch(case.model, seed=step)
        subnet.load(plan)
        for row in range(len(inputs)):
            (subnet.loss(inputs[row : row + 1], targets[row : row + 1]) / len(inputs)).backward()
        optimizer.step(subnet.updates(), learning_rate(OPTIMIZER, step, STEPS))
    found = reference_tensors(case.model, snapshot(master))
    assert_close(found, reference_run(index, combination, unsampled), 1e-8)


def test_the_two_rules_for_unsampled_rows_train_different_weights():
    frozen, drifting = (reference_run(0, "heads+mlp+layers", rule) for rule in ("freeze", "zero_grad"))
    assert max((frozen[name] - drifting[name]).abs().max().item() for name in frozen) > 1e-4
