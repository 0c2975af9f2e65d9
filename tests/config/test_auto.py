"""Values chosen for a device: whether compiling the blocks pays."""

from dataclasses import replace

import pytest
from tiny import train_config

from est_cli.config import ModelConfig, as_plain, auto, read_train_config
from est_cli.subnet.schedule import StageSpec

GPT2 = ModelConfig(12, 12, 12, 768, 3072, 50304, 1024, "layernorm", "learned", "gelu", True, True, head_dim=64)
FULL = (StageSpec(),)
MANY_SIZES = tuple(StageSpec(n / 10, mlp=n / 10) for n in range(1, 10)) + FULL


def chosen(max_steps: int, kind="cuda", devices: int = 1, stages=FULL, compile="auto", strategy="single", **device):
    config = train_config(GPT2, stages=stages, seq_len=1024, batch_size=16, max_steps=max_steps, device=kind)
    config = replace(config, trainer=replace(config.trainer, compile=compile, strategy=strategy))
    config, notes = auto.choose(config, auto.Device(kind, devices, **device))
    assert ("trainer.compile" in " ".join(notes)) == (compile == "auto"), "what is chosen is said"
    return config.trainer.compile


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        (True, {"max_steps": 150_000}),
        (False, {"max_steps": 1000}),
        (False, {"max_steps": 150_000, "kind": "cpu"}),
        (False, {"max_steps": 150_000, "has_compiler": False}),
        (True, {"max_steps": 150_000, "strategy": "ddp"}),
        (False, {"max_steps": 150_000, "strategy": "fsdp", "devices": 2}),
        (True, {"max_steps": 40_000}),
        (False, {"max_steps": 40_000, "stages": MANY_SIZES}),
        (True, {"max_steps": 1000, "compile": True}),
        (False, {"max_steps": 150_000, "compile": False}),
    ],
)
def test_blocks_are_compiled_where_a_long_run_on_a_gpu_saves_more_than_compiling_takes(expected, arguments):
    assert chosen(**arguments) is expected


@pytest.mark.parametrize(("strategy", "devices"), [("single", 1), ("ddp", 4), ("fsdp", 4), ("hsdp", 4)])
def test_the_config_in_a_run_directory_can_be_read_again(strategy, devices):
    config = train_config(GPT2, stages=FULL, seq_len=1024, batch_size=16, max_steps=1000, device="cuda")
    config = replace(config, trainer=replace(config.trainer, strategy=strategy, devices=devices, shard_size="auto"))
    resolved, _ = auto.choose(config, auto.Device("cuda", devices, per_machine=2))
    assert isinstance(resolved.trainer.shard_size, int)
    assert read_train_config(as_plain(resolved)) == resolved
