"""trainer.compile: no index, mask or layer choice is left in the graph, so that a stage has one."""

import pytest
import torch
from tiny import LLAMA, train_config
from torch._dynamo.testing import CompileCounter

from est_cli.model.initialisation import initialise
from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.training.subnetwork import PackedSubnetwork

STAGES = [Rates(0.5, 0.5, 0.5), Rates(0.5, 0.5, 1.0), Rates()]


def packed(rates: Rates) -> PackedSubnetwork:
    master = initialise(Transformer(LLAMA), 0)
    return PackedSubnetwork(master, subnetwork(LLAMA, train_config().sampling, rates), torch.float32)


def step(subnet: PackedSubnetwork, rates: Rates, number: int) -> dict[str, torch.Tensor]:
    subnet.load(sample(0, number, Stage(1, 0, 100, rates), LLAMA, train_config().sampling))
    tokens = torch.randint(LLAMA.vocab_size, (2, 9), generator=torch.Generator().manual_seed(number))
    subnet.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    return {update.name: update.gradient.clone() for update in subnet.updates()}


@pytest.mark.parametrize("rates", STAGES)
def test_twenty_plans_share_one_graph(rates):
    torch._dynamo.reset()
    counter, subnet = CompileCounter(), packed(rates)
    for block in subnet.module.blocks:
        block.compile(dynamic=False, backend=counter)
    for number in range(20):
        step(subnet, rates, number)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("rates", STAGES)
def test_compiled_gradients_are_the_eager_ones(rates):
    torch._dynamo.reset()
    eager, compiled = packed(rates), packed(rates)
    compiled.module.compile_blocks()
    for number in range(2):
        expected, found = step(eager, rates, number), step(compiled, rates, number)
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
