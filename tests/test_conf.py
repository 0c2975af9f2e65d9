"""Every option of every config group composes and validates."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from est_cli.composition.composer import compose, conf_dir
from est_cli.config import TrainConfig, as_plain, auto, read_train_config

GROUPS = ("model", "data", "tokenizer", "scheduler", "sampling", "optimizer", "trainer", "logger", "checkpoint")
OPTIONS = [(g, path.stem) for g in (*GROUPS, "experiment") for path in sorted((conf_dir() / g).glob("*.yaml"))]
NEEDED = {("data", "text"): ["data.path=x"], ("data", "hf"): ["data.path=x"], ("tokenizer", "hf"): ["tokenizer.path=x"]}


def read(*overrides: str):
    arguments = argparse.Namespace(overrides=list(overrides), config_name=None, config_dir=None)
    return read_train_config(compose("train", arguments)[0])


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_the_option_composes_and_validates(group, option):
    config = read(f"{group}={option}", *NEEDED.get((group, option), []))
    for device in (auto.Device("cpu"), auto.Device("cuda", 2, 2)):
        resolved, _ = auto.choose(config, device)
        assert resolved.stages[-1].end == resolved.trainer.max_steps
        assert read_train_config(as_plain(resolved)) == resolved, "a run directory's config is read again"


def test_every_folder_of_conf_is_a_group_that_is_tested():
    folders = {path.name for path in Path(conf_dir()).iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment", "hydra"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("model", ["nano", "gpt2", "tinyllama"])
def test_no_auto_is_left_once_a_device_is_known(kind, model):
    resolved, _ = auto.choose(read(f"model={model}", "trainer.device=auto"), auto.Device(kind))
    left = [key for section in (resolved.trainer, resolved.data) for key, value in vars(section).items()
            if value == "auto" and key != "num_workers"]  # fmt: skip
    assert left == []


def test_an_evaluation_on_a_cpu_costs_at_most_ten_steps():
    for model in ("nano", "gpt2", "tinyllama"):
        config, _ = auto.choose(read(f"model={model}"), auto.Device("cpu"))
        assert config.trainer.eval_tokens / 3 <= 10 * config.tokens_per_step


def test_a_large_final_checkpoint_is_written_only_when_asked_for():
    config, said = auto.choose(read("model=tinyllama"), auto.Device("cpu"))
    assert config.trainer.save_final == "none"
    assert any("trainer.save_final" in line for line in said)
    asked, _ = auto.choose(read("model=tinyllama", "trainer.save_final=full"), auto.Device("cpu"))
    assert asked.trainer.save_final == "full"


def keys_of(kind: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, those of lists of mappings too."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        parts = (hints[field.name], *typing.get_args(hints[field.name]))
        sections = [part for part in parts if dataclasses.is_dataclass(part)]
        if hints[field.name] not in sections:
            yield f"{prefix}{field.name}"
        for section in sections:
            yield from keys_of(section, f"{prefix}{field.name}.")


def test_every_key_is_documented_with_who_sets_it():
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text("utf-8")
    keys = set(keys_of(TrainConfig)) - {"scheduler.options"}
    assert len(keys) > 100
    assert sorted(key for key in keys if f"`{key}`" not in text) == []
    assert sorted(set(re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)) - keys) == []
