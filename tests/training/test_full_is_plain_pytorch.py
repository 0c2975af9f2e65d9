"""With every count full, training is a plain PyTorch loop, bit for bit: what EST adds costs nothing when it is off."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny import FULL, GPT2, LLAMA, RandomTokens, train_config
from torch import Tensor

from est_cli.config import ModelConfig, OptimizerConfig, SamplingConfig, TrainConfig
from est_cli.data.batches import training_windows
from est_cli.kernels.pack import CHUNK_ELEMENTS
from est_cli.model.transformer import Transformer, initialise
from est_cli.subnet.schedule import StageSpec
from est_cli.training.optimizer import learning_rate
from tests.training.runs import finished

STEPS = 20
CHUNK = 1 << 18
"""Elements of a parameter that the optimizer handles at a time, on a CPU."""

ODD = {"d_model": 66, "d_ff": 37, "vocab_size": 4099, "head_dim": 6}
MODELS = {
    "gpt2": replace(GPT2, **ODD, n_heads=5, n_kv_heads=5),
    "llama": replace(LLAMA, **ODD),
}


def micro_batches(config: TrainConfig, tokens: RandomTokens, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = config.trainer.batch_size
    for micro in range(config.trainer.grad_accum):
        first = (step * config.trainer.grad_accum + micro) * size
        batch = torch.from_numpy(training_windows(tokens.train, config.data.seq_len, config.seed, first, size))
        yield batch[:, :-1], batch[:, 1:]


def plain_loop(config: TrainConfig, tokens: RandomTokens) -> tuple[Transformer, torch.optim.AdamW, list[dict]]:
    """What a PyTorch user would write."""
    model, settings = initialise(Transformer(config.model), config.seed), config.optimizer
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    records = []
    for step in range(config.trainer.max_steps):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for inputs, targets in micro_batches(config, tokens, step):
            loss = model(inputs, targets) / config.trainer.grad_accum
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(list(model.parameters()), settings.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, config.trainer.max_steps)
        optimizer.step()
        records.append({"train/loss": total.item(), "train/grad_norm": norm.item()})
    return model, optimizer, records


def assert_same_bits(config: TrainConfig, folder) -> None:
    training, recorder = finished(config, folder)
    model, optimizer, expected_records = plain_loop(config, RandomTokens(config.model.vocab_size))
    clipped = [record["train/grad_norm"] > config.optimizer.grad_clip for record in expected_records]
    assert any(clipped)
    for record, expected in zip(recorder.records, expected_records, strict=True):
        assert {key: record[key] for key in expected} == expected, f"step {record['step']}"
    expected = {}
    for name, parameter in model.named_parameters():
        expected[name], state = parameter.data, optimizer.state[parameter]
        expected |= {f"moments.{name}": state["exp_avg"], f"squares.{name}": state["exp_avg_sq"]}
    found = training.weights() | training.moments()
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=0, atol=0)


def config_of(model: ModelConfig, unsampled: str = "zero_grad", grad_accum: int = 2, **options) -> TrainConfig:
    optimizer = OptimizerConfig(lr=3e-3, warmup=3, grad_clip=0.3, unsampled=unsampled)
    options = {"stages": FULL, "seq_len": 11, "batch_size": 2, **options}
    return train_config(model, optimizer=optimizer, max_steps=STEPS, grad_accum=grad_accum, **options)


@pytest.mark.parametrize("chunk", [CHUNK, 997], ids="chunk-{}".format)
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize("family", MODELS)
def test_full_training_equals_a_plain_pytorch_loop_bit_for_bit(tmp_path, monkeypatch, family, unsampled, chunk):
    model = MODELS[family]
    assert model.vocab_size * model.d_model > CHUNK, "a parameter of more than one chunk"
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", chunk)
    assert_same_bits(config_of(model, unsampled), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"grad_accum": 1, "recompute": "block"},
        {"grad_accum": 3, "seed": 5},
        {"stages": (StageSpec(0.3, 0.99, 0.99, 0.9), StageSpec(0.7, 0.9), StageSpec())},
        {"stages": (StageSpec(0.5), StageSpec()), "sampling": SamplingConfig(rescale_layers=True, mlp_block=4)},
    ],
    ids=["one-micro-batch-recomputed", "three-micro-batches", "rates-that-round-to-full", "stages-of-the-full-model"],
)
def test_every_setting_that_trains_the_full_model_equals_the_plain_loop(tmp_path, options):
    assert_same_bits(config_of(replace(LLAMA, vocab_size=31), **options), tmp_path)
