"""Packed and masked subnetworks are EST as the reference spells it out: loss, gradients, and trained weights."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from adapter import assert_only_sampled, full_size, reference_plan, reference_tensors
from reference import ReferenceAdamW, ReferencePlan, loss_and_gradients
from reference import grow as reference_grow
from tiny import GPT2, random_batch, random_master, snapshot
from torch import Tensor
from torch.testing import assert_close

from est_cli.config import ModelConfig, SamplingConfig
from est_cli.subnet.plan import Plan, grown_model, growth_into, model_after, stage_subnetwork, whole_plan
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, StageSpec, stage_at
from est_cli.training.optimizer import SampledAdamW, learning_rate
from est_cli.training.subnetwork import MaskedSubnetwork, PackedSubnetwork
from tests.training.runs import ARMS, OPTIMIZER, STEPS, Arm

EXECUTIONS = [PackedSubnetwork, MaskedSubnetwork]
COMBINATIONS = {
    "+".join(name for name, rate in vars(rates).items() if rate < 1): rates
    for rates in (Rates(*three) for three in product((0.5, 1.0), repeat=3))
    if rates != Rates()
}
HEADS = {"mha": (4, 4), "group": (6, 3), "query": (6, 2)}
ARCHITECTURES = list(product(HEADS, ("gelu", "swiglu"), (True, False)))


def sampled_arm(attention: str, mlp: str, tied: bool, combination: str, resample_every: int = 1) -> Arm:
    """Nine steps of sampling, three that sample only heads and MLP, three of the full model.

    The other settings follow from these, each in both its values: GPT-2, Llama, and mixtures of them.
    """
    (n_heads, n_kv_heads), rates = HEADS[attention], COMBINATIONS[combination]
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
        resample_every=resample_every,
    )
    stages = (StageSpec(9, **vars(rates)), StageSpec(12, rates.heads, rates.mlp), StageSpec())
    return Arm(stages, sampling=sampling, model=model)


def scattered_plan(case: Arm) -> Plan:
    """A plan that is no prefix in any sampled dimension: wrong rows could not pass for right ones."""
    stage = replace(case.config().stages[0], end=100)
    for step in range(stage.end):
        plan = sample(0, step, stage, case.model, case.sampling)
        kept = (plan.layers, *plan.heads, *plan.neurons)
        totals = (case.model.n_layers, *[case.model.n_heads] * len(plan.heads), *[case.model.d_ff] * len(plan.heads))
        if all(len(units) == total or units[-1] >= len(units) for units, total in zip(kept, totals, strict=True)):
            return plan
    raise AssertionError("no plan without a prefix")


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize(("attention", "mlp", "tied"), ARCHITECTURES)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_loss_and_every_gradient_equal_the_reference(execution, attention, mlp, tied, combination):
    case = sampled_arm(attention, mlp, tied, combination)
    master, plan = random_master(case.model), scattered_plan(case)
    weights, (inputs, targets) = snapshot(master), random_batch(case.model)
    subnet = execution(master, stage_subnetwork(case.model, case.sampling, case.stages[0]), torch.float64)
    subnet.load(plan)
    loss = subnet.loss(inputs, targets)
    loss.backward()

    kept = reference_plan(plan)
    found = assert_only_sampled(reference_tensors(case.model, full_size(subnet.updates(), weights)), kept)
    expected_loss, expected = loss_and_gradients(
        case.model, reference_tensors(case.model, weights), kept, inputs, targets, case.sampling.rescale_layers
    )
    assert abs(loss.item() - expected_loss.item()) <= 1e-10
    assert_close(found, expected, rtol=0, atol=1e-10)
    assert_close(snapshot(master), weights, rtol=0, atol=0)  # without an optimizer step nothing moves


def test_a_masked_run_loses_nothing_by_dropping_unsampled_gradients():
    """What `updates` leaves out is exactly zero in the full model's own gradients."""
    case = sampled_arm("group", "swiglu", False, "heads+mlp+layers")
    master, plan = random_master(case.model), scattered_plan(case)
    subnet = MaskedSubnetwork(master, stage_subnetwork(case.model, case.sampling, case.stages[0]), torch.float64)
    subnet.load(plan)
    subnet.loss(*random_batch(case.model)).backward()
    whole = {name: parameter.grad for name, parameter in master.named_parameters()}
    touched = full_size(subnet.updates(), snapshot(master))
    for name, gradient in whole.items():
        assert torch.equal(gradient, touched[name].nan_to_num(nan=0.0)), name


TRAINED = ARMS | {
    name: sampled_arm(*ARCHITECTURES[(5 * index) % len(ARCHITECTURES)], name, resample_every=1 + index % 2)
    for index, name in enumerate(COMBINATIONS)
}


def reference_scales(arm: Arm, joined: ModelConfig, plan: ReferencePlan) -> dict[int, tuple[float, float, float]]:
    """The scales of heads, neurons and layers, from their definitions."""
    powers = {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}
    sampling, kept, scales = arm.sampling, len(plan.layers), {}
    for layer in plan.layers:
        inverse = joined.n_layers / kept
        if sampling.layer_strategy == "increasing" and kept < joined.n_layers:
            dropped = 2 * (joined.n_layers - kept) / joined.n_layers
            inverse = 1 / (1 - dropped * layer / (joined.n_layers - 1))
        heads, neurons = joined.n_heads / len(plan.heads[layer]), joined.d_ff / len(plan.neurons[layer])
        modes = (sampling.rescale.heads, sampling.rescale.mlp, sampling.rescale_of_layers)
        scales[layer] = tuple(x ** powers[mode] for x, mode in zip((heads, neurons, inverse), modes, strict=True))
    return scales


@cache
def reference_run(name: str, unsampled: str) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after the run, and the loss of every step."""
    arm, config = TRAINED[name], TRAINED[name].config()
    weights = reference_tensors(arm.model, snapshot(random_master(arm.model)))
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    options = {"betas": OPTIMIZER.betas, "eps": OPTIMIZER.eps, "weight_decay": OPTIMIZER.weight_decay}
    optimizer = ReferenceAdamW(weights, arm.model, unsampled, **options)
    losses, norms = [], []
    for step in range(STEPS):
        stage = stage_at(config.stages, step)
        joined = grown_model(arm.model, stage.grown, arm.sampling.mlp_block)
        if step == 6 and arm.sources:
            before = grown_model(arm.model, config.stages[0].grown)
            new_heads, new_neurons = range(before.n_heads, joined.n_heads), range(before.d_ff, joined.d_ff)
            old = reference_plan(whole_plan(before))
            zero, copies = arm.grow == "zero", arm.grow_moments == "copy"
            reference_grow(optimizer, old, list(arm.sources), new_heads, new_neurons, zero, copies)
        plan = reference_plan(sample(config.seed, step, stage, arm.model, arm.sampling))
        plan.scales = reference_scales(arm, joined, plan)
        batch = random_batch(arm.model, seed=step)
        loss, gradients = loss_and_gradients(arm.model, weights, plan, *batch, False)
        losses.append(loss.item())
        lr, everything = learning_rate(OPTIMIZER, step, STEPS), reference_plan(whole_plan(joined))
        norms.append(optimizer.step(gradients, plan, everything, lr, OPTIMIZER.grad_clip))
    assert max(norms) > OPTIMIZER.grad_clip, "clipping must be at work in this test"
    return weights, losses


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize("name", TRAINED)
def test_losses_and_weights_of_a_run_equal_the_reference(name, unsampled, execution):
    """Sampled, growing, dropping layers: in micro-batches of one sequence."""
    arm, config = TRAINED[name], TRAINED[name].config(unsampled)
    master = random_master(arm.model)
    optimizer = SampledAdamW(master, config.optimizer, grown=model_after(config, 0))
    losses = []
    for step in range(STEPS):
        stage = stage_at(config.stages, step)
        if step == stage.first_step:
            if (growth := growth_into(config, stage)) is not None:
                assert growth.sources == list(arm.sources)
                optimizer.grow(growth, arm.grow_moments)
            subnet = execution(master, stage_subnetwork(arm.model, arm.sampling, stage), torch.float64)
        plan = sample(config.seed, step, stage, arm.model, arm.sampling)
        inputs, targets = random_batch(arm.model, seed=step)
        subnet.load(plan)
        losses.append(0.0)
        for row in range(len(inputs)):
            loss = subnet.loss(inputs[row : row + 1], targets[row : row + 1]) / len(inputs)
            loss.backward()
            losses[-1] += loss.item()
        touched = full_size(subnet.updates(), snapshot(master))
        assert_only_sampled(reference_tensors(arm.model, touched), reference_plan(plan))
        optimizer.step(subnet.updates(), learning_rate(OPTIMIZER, step, STEPS))
    expected, expected_losses = reference_run(name, unsampled)
    assert losses[0] == pytest.approx(expected_losses[0], abs=1e-10)
    assert losses == pytest.approx(expected_losses, abs=1e-8)
    assert_close(reference_tensors(arm.model, snapshot(master)), expected, rtol=0, atol=1e-8)
