"""trainer.compile: no index, mask or layer choice is left in the graph, so that a stage has one."""

from dataclasses import replace

import pytest
import torch
from tiny import LLAMA, random_batch, random_master, train_config
from torch._dynamo.testing import CompileCounter

from est_cli.model.transformer import Transformer, initialise
from est_cli.subnet.plan import stage_subnetwork, subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage, StageSpec
from est_cli.training.subnetwork import PackedSubnetwork
from tests.training.runs import ARMS, finished

STAGES = [Rates(0.5, 0.5, 0.5), Rates(0.5, 0.5, 1.0), Rates()]
SCALED = ARMS["layer_drop"]


def packed(rates: Rates, dtype: torch.dtype = torch.float32) -> PackedSubnetwork:
    master = initialise(Transformer(LLAMA), 0)
    return PackedSubnetwork(master, subnetwork(LLAMA, train_config().sampling, rates), dtype)


@pytest.fixture
def counter(monkeypatch) -> CompileCounter:
    """Counts graphs in the place of compiling them."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def compile_blocks(model: Transformer) -> None:
        for block in model.blocks:
            block.compile(dynamic=False, backend=counter)

    monkeypatch.setattr(Transformer, "compile_blocks", compile_blocks)
    return counter


def step(subnet: PackedSubnetwork, rates: Rates, number: int) -> dict[str, torch.Tensor]:
    subnet.load(sample(0, number, Stage(1, 0, 100, rates), LLAMA, train_config().sampling))
    subnet.loss(*random_batch(LLAMA, length=8, seed=number)).backward()
    return {update.name: update.gradient.clone() for update in subnet.updates()}


@pytest.mark.parametrize(
    ("model", "sampling", "stage"),
    [
        *((LLAMA, train_config().sampling, Stage(1, 0, 20, rates)) for rates in STAGES),
        (SCALED.model, SCALED.sampling, SCALED.config().stages[0]),
    ],
    ids=["heads, MLP and layers", "heads and MLP", "everything", "other scales of its layers in every step"],
)
def test_the_plans_of_a_stage_share_one_graph(counter, model, sampling, stage):
    shape = stage_subnetwork(model, sampling, stage)
    subnet = PackedSubnetwork(random_master(model, torch.float32), shape, torch.float32)
    subnet.module.compile_blocks()
    for number in range(stage.end):
        subnet.load(sample(0, number, stage, model, sampling))
        subnet.loss(*random_batch(model)).backward()
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("rates", STAGES)
def test_compiled_gradients_are_the_eager_ones(rates):
    torch._dynamo.reset()
    eager, compiled = packed(rates), packed(rates)
    compiled.module.compile_blocks()
    for number in range(2):
        found, expected = step(compiled, rates, number), step(eager, rates, number)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_bf16_is_as_close_to_fp32_as_eager_bf16_is():
    """The two differ: fused operations keep fp32 between them where eager ones round to bf16."""
    torch._dynamo.reset()
    exact, eager, compiled = packed(STAGES[2]), packed(STAGES[2], torch.bfloat16), packed(STAGES[2], torch.bfloat16)
    compiled.module.compile_blocks()
    distances = {"eager": [], "compiled": []}
    for number in range(8):
        truth = step(exact, STAGES[2], number)
        for name, subnet in (("eager", eager), ("compiled", compiled)):
            found = step(subnet, STAGES[2], number)
            errors = [(found[key] - gradient).square().sum() for key, gradient in truth.items()]
            distances[name].append(sum(errors).sqrt())
    assert not torch.equal(*map(torch.stack, distances.values()))
    assert sum(distances["compiled"]) < 1.05 * sum(distances["eager"])


def test_a_run_compiles_each_size_of_block_once_and_says_so_after_the_first_step_that_uses_it(counter, tmp_path):
    """Stages 1 and 2 have blocks of one size, and evaluations run eagerly."""
    _, recorder = finished(train_config(LLAMA, compile=True, eval_every=4, eval_tokens=40), tmp_path)
    said = [message.split(" s:")[0] for message in recorder.messages if "compiled" in message]
    assert [message.split(" in ")[0] for message in said] == ["step 0: compiled", "step 7: compiled"]
    assert all(float(message.split(" in ")[1]) < 100 for message in said)
    assert counter.frame_count == 2


def test_sizes_of_block_beyond_torchs_limit_are_compiled_too(counter, tmp_path):
    model = replace(LLAMA, d_ff=48)
    stages = (*(StageSpec(2 * n, mlp=n / 12) for n in range(1, 12)), StageSpec())
    config = train_config(model, stages=stages, compile=True, max_steps=24)
    finished(config, tmp_path)
    assert counter.frame_count == 12
