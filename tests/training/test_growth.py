"""Growth, RAPTR and layer dropping are what the reference spells out; a grown run survives anything."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from adapter import assert_only_sampled, full_size, matrices, reference_plan, reference_tensors, sizes
from reference import ReferenceAdamW, ReferencePlan, clip, loss_and_gradients
from reference import grow as reference_grow
from tiny import GPT2, LLAMA, RandomTokens, Recorder, random_batch, random_master, snapshot, train_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from est_cli.config import ModelConfig, OptimizerConfig, RescaleConfig, SamplingConfig, SchedulerConfig, TrainConfig
from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import (
    Growth,
    Subnetwork,
    grown_model,
    growth_into,
    model_after,
    stage_subnetwork,
    whole_plan,
)
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, StageSpec, layer_drop, raptr, stacking, stage_at
from est_cli.training import loop
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import World
from est_cli.training.growth import grow
from est_cli.training.loop import Training
from est_cli.training.optimizer import SampledAdamW, learning_rate
from est_cli.training.subnetwork import MaskedSubnetwork, PackedSubnetwork

CPU = World(torch.device("cpu"))
STEPS = 15
SIX = replace(GPT2, n_layers=6)
SIX_LLAMA = replace(LLAMA, n_layers=6)
OPTIMIZER = OptimizerConfig(lr=5e-3, weight_decay=0.1, grad_clip=0.5, warmup=3)


@dataclass(frozen=True)
class Arm:
    stages: tuple[StageSpec, ...]
    grow: str = "stack"
    grow_moments: str = "copy"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    model: ModelConfig = SIX
    sources: tuple[int | None, ...] = ()
    """Where every layer starts from at the growth, written by hand."""

    def config(self, **trainer) -> TrainConfig:
        config = train_config(self.model, self.sampling, OPTIMIZER, self.stages, max_steps=STEPS, **trainer)
        return replace(config, scheduler=SchedulerConfig(self.stages, self.grow, self.grow_moments))


def stacked(grow: str, *sources: int | None, depth: int = 2, **options) -> Arm:
    return Arm(tuple(stacking(Rates(), 6, depth)), grow, sources=sources, **options)


SQRT = SamplingConfig(layer_strategy="ends", rescale=RescaleConfig(layers="sqrt"))
BY_DEPTH = SamplingConfig(layer_strategy="increasing", rescale=RescaleConfig(layers="inverse"))
UNSCALED = SamplingConfig(rescale=RescaleConfig(heads="none", mlp="sqrt"))
ARMS = {
    "stack": stacked("stack", 0, 1, 0, 1, 0, 1),
    "stack, reset": stacked("stack", 0, 1, 0, 1, 0, 1, grow_moments="reset"),
    "interleave": stacked("interleave", 0, 0, 0, 1, 1, 1, model=SIX_LLAMA),
    "interleave, reset": stacked("interleave", 0, 0, 0, 1, 1, 1, grow_moments="reset"),
    "middle": stacked("middle", 0, 1, 2, 1, 2, 3, depth=4),
    "zero": stacked("zero", 0, 1, None, None, None, None),
    "zero from nothing": stacked("zero", *[None] * 6, depth=0),
    "random": stacked("random", 0, 1, None, None, None, None, model=SIX_LLAMA),
    "one layer": stacked("stack", *[0] * 6, depth=1),
    "heads and neurons": Arm((StageSpec(6, n_heads=2, d_ff=6), StageSpec()), sources=tuple(range(6)), model=SIX_LLAMA),
    "everything, sampled": Arm(
        (StageSpec(6, 0.5, 0.5, 0.5, n_layers=4, n_heads=2, d_ff=8), StageSpec(10, 0.5, 0.5, 0.75), StageSpec()),
        sources=(0, 1, 2, 3, 0, 1),
    ),
    "raptr": Arm(tuple(raptr(Rates(layers=0.5), 3)), sampling=SQRT),
    "layer_drop": Arm(tuple(layer_drop(Rates(), 0.7, 3)), sampling=BY_DEPTH),
    "neither scaled as in the paper": Arm((StageSpec(6, 0.5, 0.5), StageSpec()), sampling=UNSCALED),
}
GROWING = [name for name, arm in ARMS.items() if arm.sources]


def reference_scales(arm: Arm, joined: ModelConfig, plan: ReferencePlan) -> dict[int, tuple[float, float, float]]:
    """Of heads, neurons and layers, from the definitions."""
    powers = {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}
    modes, kept, scales = arm.sampling.rescale, len(plan.layers), {}
    for layer in plan.layers:
        inverse = joined.n_layers / kept
        if arm.sampling.layer_strategy == "increasing" and kept < joined.n_layers:
            dropped = 2 * (joined.n_layers - kept) / joined.n_layers
            inverse = 1 / (1 - dropped * layer / (joined.n_layers - 1))
        heads, neurons = joined.n_heads / len(plan.heads[layer]), joined.d_ff / len(plan.neurons[layer])
        scales[layer] = (heads ** powers[modes.heads], neurons ** powers[modes.mlp], inverse ** powers[modes.layers])
    return scales


def reference_run(arm: Arm, unsampled: str) -> tuple[dict[str, Tensor], list[float]]:
    config = arm.config()
    weights = reference_tensors(arm.model, snapshot(random_master(arm.model)))
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    optimizer = ReferenceAdamW(
        weights, OPTIMIZER.lr, OPTIMIZER.betas, OPTIMIZER.eps, OPTIMIZER.weight_decay, matrices(weights), unsampled
    )
    losses = []
    for step in range(STEPS):
        stage = stage_at(config.stages, step)
        joined = grown_model(arm.model, stage.grown, arm.sampling.mlp_block)
        if step == 6 and arm.sources:
            before = grown_model(arm.model, config.stages[0].grown)
            new_heads, new_neurons = range(before.n_heads, joined.n_heads), range(before.d_ff, joined.d_ff)
            old = reference_plan(whole_plan(before))
            zero, copies = arm.grow == "zero", arm.grow_moments == "copy"
            reference_grow(weights, optimizer, old, list(arm.sources), [*new_heads], [*new_neurons], zero, copies)
        plan = reference_plan(sample(config.seed, step, stage, arm.model, arm.sampling))
        plan.scales = reference_scales(arm, joined, plan)
        optimizer.lr = learning_rate(OPTIMIZER, step, STEPS)
        batch = random_batch(arm.model, seed=step)
        loss, gradients = loss_and_gradients(sizes(arm.model), weights, plan, *batch, False)
        losses.append(loss.item())
        clip(gradients, OPTIMIZER.grad_clip)
        optimizer.step(gradients, plan, sizes(arm.model), reference_plan(whole_plan(joined)))
    return weights, losses


@pytest.mark.parametrize("execution", [PackedSubnetwork, MaskedSubnetwork])
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize("name", ARMS)
def test_losses_and_weights_equal_the_reference(name, unsampled, execution):
    arm = ARMS[name]
    config = arm.config()
    master = random_master(arm.model)
    optimizer = SampledAdamW(master, replace(OPTIMIZER, unsampled=unsampled), grown=model_after(config, 0))
    losses, subnet = [], None
    for step in range(STEPS):
        stage = stage_at(config.stages, step)
        if step == stage.first_step:
            if (growth := growth_into(config, stage)) is not None:
                assert growth.sources == list(arm.sources)
                grow(master, optimizer, growth, arm.grow_moments)
            subnet = execution(master, stage_subnetwork(arm.model, arm.sampling, stage), torch.float64)
        plan, (inputs, targets) = (
            sample(config.seed, step, stage, arm.model, arm.sampling),
            random_batch(arm.model, seed=step),
        )
        subnet.load(plan)
        loss = subnet.loss(inputs, targets)
        loss.backward()
        losses.append(loss.item())
        weights = snapshot(master)
        assert_only_sampled(reference_tensors(arm.model, full_size(subnet.updates(), weights)), reference_plan(plan))
        optimizer.step(subnet.updates(), learning_rate(OPTIMIZER, step, STEPS))
    expected, expected_losses = reference_run(arm, unsampled)
    assert losses[0] == pytest.approx(expected_losses[0], abs=1e-10)
    assert losses == pytest.approx(expected_losses, abs=1e-8)
    for key, tensor in reference_tensors(arm.model, snapshot(master)).items():
        difference = (tensor - expected[key]).abs().max().item()
        assert difference <= 1e-8, f"{key} differs by {difference}"


def whole_loss(master: Transformer, model: ModelConfig) -> float:
    """Of the part of the model that has joined."""
    subnet = PackedSubnetwork(master, Subnetwork(model), torch.float64)
    subnet.load_whole()
    return subnet.loss(*random_batch(model)).item()


def grown(master: Transformer, before: StageSpec, method: str) -> tuple[float, float]:
    """The loss before and after a growth to the whole model."""
    model = master.config
    small = grown_model(model, before.grown)
    optimizer = SampledAdamW(master, OPTIMIZER, grown=small)
    first = whole_loss(master, small)
    grow(master, optimizer, Growth(small, model, method), "copy")
    return first, whole_loss(master, model)


@pytest.mark.parametrize("model", [SIX, SIX_LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    ("before", "method"),
    [
        (StageSpec(n_layers=2), "zero"),
        (StageSpec(n_layers=0), "zero"),
        (StageSpec(n_heads=0.5), "stack"),
        (StageSpec(d_ff=4), "stack"),
        (StageSpec(n_layers=0.5, n_heads=0.5, d_ff=0.25), "zero"),
    ],
)
def test_what_joins_with_outputs_of_zero_changes_no_function(model, before, method):
    first, second = grown(random_master(model), before, method)
    assert second == pytest.approx(first, abs=1e-12)
    untouched = random_master(model)
    assert abs(whole_loss(untouched, model) - first) > 1e-3, "without the zeros it would have changed"


def test_a_stacked_model_is_the_model_made_by_hand():
    master = random_master(SIX)
    by_hand = Transformer(SIX, dtype=torch.float64)
    for name, parameter in by_hand.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        source = name if layer is None else name.replace(f"blocks.{layer}.", f"blocks.{layer % 2}.", 1)
        parameter.data = dict(master.named_parameters())[source].detach().clone()
    _, stacked_loss = grown(master, StageSpec(n_layers=2), "stack")
    assert stacked_loss == pytest.approx(by_hand(*random_batch(SIX)).item(), abs=1e-12)
    assert all(torch.equal(tensor, dict(by_hand.named_parameters())[name]) for name, tensor in snapshot(master).items())


@pytest.mark.parametrize(
    ("method", "old", "new", "sources", "joined"),
    [
        ("stack", 3, 6, [0, 1, 2, 0, 1, 2], [3, 4, 5]),
        ("stack", 3, 7, [0, 1, 2, 0, 1, 2, 0], [3, 4, 5, 6]),
        ("interleave", 3, 6, [0, 0, 1, 1, 2, 2], [1, 3, 5]),
        ("interleave", 3, 5, [0, 0, 1, 1, 2], [1, 3]),
        ("middle", 4, 6, [0, 1, 2, 1, 2, 3], [3, 4]),
        ("middle", 3, 6, [0, 1, 2, 0, 1, 2], [3, 4, 5]),
        ("middle", 1, 4, [0, 0, 0, 0], [1, 2, 3]),
        ("middle", 2, 7, [0, 1, 0, 1, 0, 1, 0], [2, 3, 4, 5, 6]),
        ("zero", 2, 4, [0, 1, None, None], [2, 3]),
        ("random", 1, 3, [0, None, None], [1, 2]),
    ],
)
def test_every_layer_knows_where_it_starts_from(method, old, new, sources, joined):
    growth = Growth(replace(SIX, n_layers=old), replace(SIX, n_layers=new), method)
    assert growth.sources == sources
    assert growth.joined == joined
    assert all(source is None or source <= layer for layer, source in enumerate(sources)), "safe from the last down"


def start(config: TrainConfig) -> tuple[Training, Recorder]:
    recorder = Recorder()
    return Training(config, RandomTokens(config.model.vocab_size), CPU, [recorder]), recorder


def test_until_it_joins_a_layer_stands_still_has_no_moments_and_is_not_evaluated(tmp_path):
    arm = ARMS["stack"]
    config = arm.config(eval_every=3)
    training, recorder = start(config)
    before = snapshot(training.model)
    training.run(Checkpoints(tmp_path), stopping=lambda: training.step == 5)
    after = snapshot(training.model)
    late = [name for name in before if name.startswith("blocks.") and int(name.split(".")[1]) >= 2]
    assert late and all(torch.equal(before[name], after[name]) for name in late)
    assert not set(late) & set(training.optimizer.moments)
    assert not any(name.partition(".")[2] in late for name in training.optimizer.state())
    small = Training(replace(config, model=replace(SIX, n_layers=2), scheduler=SchedulerConfig((StageSpec(),))),
                     RandomTokens(SIX.vocab_size), CPU, [])  # fmt: skip
    assert small.model.load_state_dict({k: v for k, v in after.items() if k not in late}) is not None
    small.grown = small.config.model
    assert training.val_loss is not None
    assert small.validate(small._build(small.stages[0])) == training.validate(training._build(training.stages[0]))
    assert {record["grown/layers"] for record in recorder.records} == {2 / 6}


def test_a_run_that_does_not_grow_logs_the_contracts_keys_alone(tmp_path):
    training, recorder = start(ARMS["raptr"].config())
    training.run(Checkpoints(tmp_path), stopping=lambda: False)
    assert not any(key.startswith("grown/") for key in recorder.records[0])


@pytest.mark.parametrize("name", GROWING)
def test_the_logged_flops_are_what_the_step_executes_on_both_sides_of_a_growth(name, monkeypatch):
    training, recorder = start(ARMS[name].config())
    monkeypatch.setattr(training, "validate", lambda subnet: 0.0)
    subnet = None
    for step in range(STEPS):
        stage = stage_at(training.stages, step)
        if step == stage.first_step:
            training._grow_into(stage)
            subnet = training._build(stage)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            training._train_step(stage, subnet)
        assert counter.get_total_flops() == recorder.records[-1]["flops/step"], f"step {step}"
    assert recorder.records[5]["flops/step"] < recorder.records[-1]["flops/step"]


def repeatable(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]


@pytest.mark.parametrize("stop_after", [3, 6, 7], ids=["before", "at", "after"])
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize("name", GROWING)
def test_a_run_that_stops_around_a_growth_goes_on_to_the_same_bits(name, unsampled, stop_after, tmp_path):
    config = ARMS[name].config(eval_every=5, save_final="full")
    config = replace(config, optimizer=replace(OPTIMIZER, unsampled=unsampled))
    whole, recorder = start(config)
    whole.run(Checkpoints(tmp_path / "whole"), stopping=lambda: False)
    first, before = start(config)
    first.run(Checkpoints(tmp_path / "parts"), stopping=lambda: first.step == stop_after)
    second, after = start(config)
    second.restore(Checkpoints(tmp_path / "parts").newest(pytest.fail))
    second.run(Checkpoints(tmp_path / "parts"), stopping=lambda: False)
    assert repeatable([*before.records, *after.records]) == repeatable(recorder.records)
    files = [Checkpoints(tmp_path / name).newest(pytest.fail).folder for name in ("whole", "parts")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_a_run_that_dies_in_the_middle_of_a_growth_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """A growth writes nothing: what counts is the checkpoint before it."""
    config = ARMS["interleave"].config(checkpoint_every=3, save_final="full")
    whole, _ = start(config)
    whole.run(Checkpoints(tmp_path / "whole"), stopping=lambda: False)
    first, _ = start(config)
    copy, calls = Tensor.copy_, []

    def dies(self, source):
        calls.append(source)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return copy(self, source)

    def grow_and_die(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "copy_", dies)
            grow(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "grow", grow_and_die)
        with pytest.raises(KeyboardInterrupt):
            first.run(Checkpoints(tmp_path / "parts"), stopping=lambda: False)
    second, _ = start(config)
    second.restore(Checkpoints(tmp_path / "parts").newest(pytest.fail))
    assert second.step == 6
    second.run(Checkpoints(tmp_path / "parts"), stopping=lambda: False)
    expected = snapshot(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in snapshot(second.model).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["stack", "heads and neurons", "raptr", "layer_drop"])
def test_masked_and_packed_runs_agree(name, precision, tmp_path):
    config = ARMS[name].config(precision=precision, eval_every=5)
    config = replace(config, optimizer=replace(OPTIMIZER, eps=1e-5))
    records = []
    for kernels in ("torch", "masked"):
        training, recorder = start(replace(config, kernels=kernels))
        training.run(Checkpoints(tmp_path / kernels), stopping=lambda: False)
        records.append(recorder.records)
    tolerance = 1e-5 if precision == "fp32" else 0.03
    for packed, masked in zip(*records, strict=True):
        assert packed["train/loss"] == pytest.approx(masked["train/loss"], abs=tolerance)
        assert packed["val/loss"] == pytest.approx(masked["val/loss"], abs=tolerance)


def test_a_compiled_run_keeps_one_graph_while_the_scales_of_its_layers_change():
    """The scales are data of the graph: a plan with other ones compiles nothing new."""
    arm, graphs = ARMS["layer_drop"], []
    config = arm.config()
    master = random_master(arm.model, torch.float32)
    subnet = PackedSubnetwork(master, stage_subnetwork(arm.model, arm.sampling, config.stages[0]), torch.float32)
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in subnet.module.blocks:
        block.compile(dynamic=False, backend=backend)
    seen = set()
    for step in range(5):
        plan = sample(0, step, config.stages[0], arm.model, arm.sampling)
        seen.add(str(plan.scales))
        subnet.load(plan)
        subnet.loss(*random_batch(arm.model)).backward()
    assert len(seen) > 1
    assert len(graphs) == 1
