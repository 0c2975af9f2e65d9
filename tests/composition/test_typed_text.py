"""What is typed is obeyed as it was typed, or refused: names stay texts, and nothing is ignored without a word."""

import argparse
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from est_cli.commands import entry, train
from est_cli.composition.composer import Composer, compose
from est_cli.composition.typed_text import as_typed
from est_cli.config import read_train_config
from est_cli.experiments import naming
from tests.commands import cli


def typed(monkeypatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["est-train", *arguments])
    return entry.read_arguments(train._add_flags)


def config(monkeypatch, *arguments: str):
    return read_train_config(compose(train.primary_config(given := typed(monkeypatch, *arguments)), given)[0])


@pytest.mark.parametrize("name", ["47_113", "471_13", "1234e56", "77", "007", "null", "true", "0x1f", "1e3", "nan"])
@pytest.mark.parametrize("key", ["run_id", "name"])
def test_a_name_stays_what_was_typed(monkeypatch, key, name):
    assert getattr(config(monkeypatch, f"{key}={name}"), key) == name


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run=77", "77"),
        ("runs=[77,7_8,b]", ["77", "7_8", "b"]),
        ("data.path=a#b.txt", "a#b.txt"),
        ("data.path=ü/x(1).txt", "ü/x(1).txt"),
        ("data.split=train[:50%]", "train[:50%]"),
        ("logger.group=1_0", "1_0"),
        ("hydra.run.dir=7_7", "7_7"),
        ('prompt="Hello," she said', '"Hello," she said'),
        ("prompt='tis the season", "'tis the season"),
        ("data.path='a b'", "a b"),
        ("data.path=null", None),
        ("seed=1_0", 10),
    ],
)
def test_texts_are_texts_and_numbers_numbers(override, value):
    assert OverridesParser.create().parse_override(as_typed([override])[0]).value() == value


@pytest.mark.parametrize("values", ["4_7,5e3,x", "choice(4_7,5e3,x)"])
def test_a_sweep_over_names_keeps_them_and_its_folders_are_named_so(monkeypatch, values):
    with Composer("train", typed(monkeypatch, "-m", f"logger.group={values}")) as composer:
        master = composer.compose_sweep()
        swept = OverridesParser.create().parse_override(master.hydra.overrides.task[0])
        jobs = [composer.compose_job([f"logger.group={value}"]) for value in swept.sweep_string_iterator()]
        assert [job.logger.group for job in jobs] == ["4_7", "5e3", "x"]
        names = [naming.job_name(composer.compose_job([f"logger.group={v}"])) for v in ("'5e3'", "x")]
        assert names == ["group-5e3", "group-x"]


@pytest.mark.parametrize(
    ("arguments", "environment", "mode"),
    [
        ([], {}, "offline"),
        ([], {"WANDB_MODE": "disabled"}, "disabled"),
        ([], {"WANDB_MODE": "dryrun"}, "offline"),
        (["logger.mode=offline"], {"WANDB_MODE": "online"}, "offline"),
    ],
)
def test_wandbs_own_variables_are_obeyed_where_nothing_is_given(monkeypatch, arguments, environment, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logger = config(monkeypatch, *arguments).logger
    assert (logger.mode, logger.project) == (mode, "mine")


def test_an_experiment_says_where_its_run_goes(place):
    (place / "own/experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra: {run: {dir: my/place}}\ntrainer: {max_steps: 2}\nscheduler: {stages: [{}]}\n"
    (place / "own/experiment/there.yaml").write_text(text)
    cli.train(place, "--config-dir=own", "experiment=there")
    assert (place / "my/place/summary.json").exists()
