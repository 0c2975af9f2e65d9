"""FLOPs from shapes equal what torch counts on the executed step; savings are the paper's."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny import GPT2, LLAMA, THREE_STAGES, random_batch, random_master, train_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from est_cli.benchmark.case import PRESETS
from est_cli.config import ModelConfig, OptimizerConfig, SamplingConfig
from est_cli.subnet.flops import config_ledger, training_flops
from est_cli.subnet.memory import CHUNK_LOGITS
from est_cli.subnet.plan import subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage, StageSpec, stage_at
from est_cli.training.optimizer import SampledAdamW
from est_cli.training.subnetwork import PackedSubnetwork

ATTENTION = {
    "gpt2": (GPT2, "group"),
    "llama-group": (LLAMA, "group"),
    "llama-query": (replace(LLAMA, n_heads=6, n_kv_heads=2), "query"),
}
GRANULARITIES = [Rates(*three) for three in product((0.5, 1.0), repeat=3)]


def executed_flops(model: ModelConfig, sampling: SamplingConfig, rates: Rates) -> int:
    """What torch counts in one optimizer step of two micro-batches: pack, forward, backward, unpack, AdamW."""
    master = random_master(model, torch.float32)
    optimizer = SampledAdamW(master, OptimizerConfig())
    subnet = PackedSubnetwork(master, subnetwork(model, sampling, rates), torch.float32)
    plan = sample(0, 0, Stage(1, 0, 1, rates), model, sampling)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        subnet.load(plan)
        for micro in range(2):
            (subnet.loss(*random_batch(model, batch=3, length=7, seed=micro)) / 2).backward()
        optimizer.step(subnet.updates(), 1e-3)
    return counter.get_total_flops()


@pytest.mark.parametrize("rates", GRANULARITIES, ids=lambda rates: f"{rates.heads}-{rates.mlp}-{rates.layers}")
@pytest.mark.parametrize("attention", ATTENTION)
def test_the_formula_is_what_the_step_executes(attention, rates):
    model, gqa = ATTENTION[attention]
    sampling = SamplingConfig(gqa=gqa, mlp_block=2)
    expected = training_flops(subnetwork(model, sampling, rates).model, seq_len=7, tokens=2 * 21)
    assert executed_flops(model, sampling, rates) == expected.total


def test_a_chunked_head_costs_what_a_whole_one_costs(monkeypatch):
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 5 * GPT2.vocab_size)
    assert executed_flops(GPT2, SamplingConfig(), Rates()) == training_flops(GPT2, 7, 2 * 21).total


@pytest.mark.parametrize(
    ("name", "first", "second", "saved_blocks", "saved"),
    [("gpt2", 20_000, 70_000, 0.26667, 0.1943), ("tinyllama", 25_000, 62_500, 0.25, 0.237)],
)
def test_the_papers_recipes_save_what_the_paper_reports(name, first, second, saved_blocks, saved):
    """Counted on the blocks as the paper does, which cost a half and a quarter; on the whole model it is less."""
    model, stages = PRESETS[name], (StageSpec(first, 0.5, 0.5, 0.5), StageSpec(second, 0.5, 0.5), StageSpec())
    ledger = config_ledger(train_config(model, stages=stages, seq_len=model.max_seq_len, max_steps=150_000))
    assert ledger.saved_blocks(150_000) == pytest.approx(saved_blocks, abs=1e-4)
    assert ledger.saved(150_000) == pytest.approx(saved, abs=1e-3)


def test_the_ledger_adds_up_what_every_step_spends():
    config = train_config(LLAMA, stages=THREE_STAGES, max_steps=15, batch_size=3, grad_accum=2, devices=2)
    ledger, tokens, total, blocks = config_ledger(config), 3 * 2 * 2 * 8, 0, 0
    full = training_flops(LLAMA, 8, tokens)
    for step in range(15):
        small = subnetwork(LLAMA, config.sampling, stage_at(config.stages, step).rates).model
        cost = training_flops(small, 8, tokens)
        total, blocks = total + cost.total, blocks + cost.blocks
        assert ledger.record(step) == {
            "flops/step": cost.total,
            "flops/total": total,
            "flops/full_total": (step + 1) * full.total,
            "flops/saved": pytest.approx(1 - total / ((step + 1) * full.total), abs=1e-12),
            "flops/saved_blocks": pytest.approx(1 - blocks / ((step + 1) * full.blocks), abs=1e-12),
        }
    assert ledger.stage_saved(1) > ledger.stage_saved(2) > ledger.stage_saved(3) == 0.0
