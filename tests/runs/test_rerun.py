"""est-train --rerun DIR: a run again from what its folder recorded, and what may be changed of it."""

import argparse
from pathlib import Path

import pytest
import yaml

from est_cli.commands.train import primary_config
from est_cli.composition.composer import compose
from est_cli.config import TrainConfig, as_plain, auto, read_train_config
from est_cli.errors import UserError
from tests.commands.cli import call


def composed(*overrides: str, rerun: Path | None = None) -> TrainConfig:
    arguments = argparse.Namespace(overrides=list(overrides), config_name=None, config_dir=None, rerun=rerun)
    return auto.choose(read_train_config(compose(primary_config(arguments), arguments)[0]), auto.Device("cpu"))[0]


def recorded(folder: Path, *overrides: str) -> TrainConfig:
    """The config of a run, left in `folder` as est-train leaves it."""
    config = composed(*overrides)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_plain(config), sort_keys=False))
    return config


def without_call(config: TrainConfig) -> dict:
    return {key: value for key, value in as_plain(config).items() if key not in ("run_id", "format")}


@pytest.mark.parametrize("option", ["scheduler=full", "scheduler=ramp", "model=gpt2", "experiment=quickstart"])
def test_the_recorded_config_comes_back_whole(tmp_path, option):
    """Whatever the group's default option holds besides is gone: scheduler=full has no stage1_end."""
    config = recorded(tmp_path, option, "run_id=first", "format=json")
    again = composed(rerun=tmp_path)
    assert without_call(again) == without_call(config)
    assert (again.run_id != "first", again.format) == (True, "text")


def test_overrides_and_groups_change_what_is_repeated(tmp_path):
    recorded(tmp_path, "experiment=quickstart")
    again = composed("seed=3", "scheduler=full", "trainer.max_steps=50", "model.n_heads=8", rerun=tmp_path)
    assert (again.seed, len(again.stages), again.trainer.max_steps) == (3, 1, 50)
    assert again.model.head_dim == again.model.d_model // 8


@pytest.mark.parametrize("override", ["scheduler.stage1_end=0.3", "sampling.heads=0.25", "sampling=layers"])
def test_a_key_that_cannot_reach_the_recorded_stages_is_refused(tmp_path, override):
    recorded(tmp_path)
    with pytest.raises(UserError, match=r"does not reach the stages.*scheduler=three_stage"):
        composed(override, rerun=tmp_path)
    assert composed(override, "scheduler=three_stage", rerun=tmp_path).stages[0] != composed(rerun=tmp_path).stages[0]


@pytest.mark.parametrize("content", ["a: 1", "[1, 2]", "{"])
def test_a_config_of_something_else_is_bad_input(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"--rerun=.*config\.yaml"):
        composed(rerun=tmp_path)


def test_a_folder_that_is_no_run_is_bad_input_and_none_is_made(tmp_path):
    done = call("est-train", "--rerun", "nothing", cwd=tmp_path)
    assert done.code == 2
    assert "--rerun=nothing: is no run directory" in done.err
    assert list(tmp_path.iterdir()) == []
