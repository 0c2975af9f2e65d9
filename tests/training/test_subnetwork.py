"""Where the packed subnetwork's tensors live, and what is copied when. test_equivalence.py: which rows it holds."""

import gc
import weakref

import pytest
import torch
from tiny import FAMILIES, GPT2, LLAMA, random_batch, random_master

from est_cli.config import SamplingConfig
from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import Plan, Subnetwork, subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.training.distributed import World
from est_cli.training.subnetwork import PackedSubnetwork
from est_cli.training.validation import validation_loss

HALF = Rates(0.5, 0.5, 0.5)
SAMPLING = SamplingConfig()


def packed(master: Transformer, rates: Rates, dtype: torch.dtype = torch.float32) -> PackedSubnetwork:
    return PackedSubnetwork(master, subnetwork(master.config, SAMPLING, rates), dtype)


def plan_of(master: Transformer, rates: Rates, step: int = 0) -> Plan:
    return sample(0, step, Stage(1, 0, 100, rates), master.config, SAMPLING)


def addresses(subnet: PackedSubnetwork) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in subnet.module.named_parameters()}


@pytest.mark.parametrize("rates", [HALF, Rates(layers=0.5), Rates(heads=0.5), Rates(mlp=0.5)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_only_sampled_rows_are_copied_and_the_rest_is_the_masters_own(family, rates):
    master = random_master(FAMILIES[family], torch.float32)
    master.recompute = True
    subnet = packed(master, rates)
    assert subnet.module.recompute and len(subnet.module.blocks) == (2 if rates.layers < 1 else 3)
    own = {name: parameter.data_ptr() for name, parameter in master.named_parameters()}
    assert addresses(subnet)["embedding"] == own["embedding"], "from the start: a copy would cost its memory"
    for step in range(5):
        subnet.load(plan_of(master, rates, step))
        for name, address in addresses(subnet).items():
            assert (address == own[subnet.names[name]]) == (name not in subnet.rows), name
    sampled = {"attention.qkv": rates.heads, "attention.out": rates.heads, "mlp.up": rates.mlp, "mlp.down": rates.mlp}
    for module, rate in sampled.items():
        assert (f"blocks.0.{module}.weight" in subnet.rows) == (rate < 1)
    assert not {"embedding", "norm.weight", "blocks.0.norm1.weight"} & set(subnet.rows)


@pytest.mark.parametrize("rates", [HALF, Rates()])
def test_a_subnetwork_that_nobody_holds_is_gone(rates):
    """In bf16 hooks add up its gradients: what they hold, they would keep for the whole run."""
    master = random_master(LLAMA, torch.float32)
    subnet = packed(master, rates, torch.bfloat16)
    subnet.load(plan_of(master, rates))
    subnet.loss(*random_batch(LLAMA)).backward()
    assert subnet.updates()
    alive = [weakref.ref(slot) for slot in subnet.parameters.values()]
    del subnet
    gc.collect()
    assert not any(slot() is not None for slot in alive)


def test_in_fp32_with_every_count_full_the_module_is_the_master():
    master = random_master(LLAMA, torch.float32)
    assert packed(master, Rates()).module is master
    assert packed(master, Rates(0.9, 0.99, 0.9)).module is master, "rates that round to everything"
    assert packed(master, HALF).module is not master


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slots_of_a_stage_stay_where_they_are(dtype):
    master, found = random_master(LLAMA, torch.float32), []
    subnet = packed(master, HALF, dtype)
    for step in range(3):
        subnet.load(plan_of(master, HALF, step))
        subnet.loss(*random_batch(LLAMA)).backward()
        subnet.updates()
        found.append({name: address for name, address in addresses(subnet).items() if name in subnet.rows})
    assert found[0] and found == [found[0]] * 3


@pytest.mark.parametrize("rates", [HALF, Rates()], ids=["half", "full"])
def test_in_bf16_gradients_of_micro_batches_are_added_up_in_fp32(rates):
    master = random_master(LLAMA, torch.float32)
    subnet, single = packed(master, rates, torch.bfloat16), packed(master, rates, torch.bfloat16)
    plan, batches = plan_of(master, rates), [random_batch(LLAMA, seed=seed) for seed in range(5)]
    assert subnet.module is not master
    total: dict[str, torch.Tensor] = {}
    for inputs, targets in batches:
        single.load(plan)
        (single.loss(inputs, targets) / 5).backward()
        for update in single.updates():
            assert update.gradient.dtype == torch.float32
            total[update.name] = total.get(update.name, 0.0) + update.gradient.clone()
    for _ in range(2):  # twice: the accumulators start again with every plan
        subnet.load(plan)
        for inputs, targets in batches:
            (subnet.loss(inputs, targets) / 5).backward()
        for update in subnet.updates():
            assert torch.equal(update.gradient, total[update.name]), update.name
    in_bf16 = sum(not torch.equal(t, t.bfloat16().float()) for t in total.values())
    assert in_bf16 > len(total) / 2, "sums that bf16 could not hold"
    assert all(parameter.dtype == torch.bfloat16 for parameter in subnet.module.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in master.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validation_is_the_full_model_without_a_rescale(dtype):
    """Also right after a step of a subnetwork, and with a last batch that is not full."""
    master = random_master(GPT2, torch.float32)
    subnet = packed(master, HALF, dtype)
    subnet.load(plan_of(master, HALF))
    subnet.loss(*random_batch(GPT2)).backward()
    inputs, targets = random_batch(GPT2, batch=5)
    windows = torch.cat([inputs, targets[:, -1:]], dim=1)
    whole = PackedSubnetwork(master, Subnetwork(GPT2), dtype)
    found = validation_loss(whole, windows.numpy(), 2, World(device=torch.device("cpu")))
    with torch.no_grad():
        logits = master.logits(windows[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.mT, windows[:, 1:])
    assert found == pytest.approx(expected.item(), abs=1e-6 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("neurons", [[1, 1], [3, 2]], ids=["twice", "out of order"])
def test_a_plan_that_names_a_row_twice_or_out_of_order_is_a_programmers_error(neurons):
    """Its scatter would lose an update: the kernels rely on rows that ascend."""
    master = random_master(LLAMA, torch.float32)
    plan = plan_of(master, HALF)
    plan.neurons[0, :2] = neurons
    with pytest.raises(AssertionError, match="sampled once"):
        packed(master, HALF).load(plan)
