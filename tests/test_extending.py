"""docs/extending.md: its files, written and run as the page says, print what the page shows."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.cli import call, clean_environment, run

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = [(commands, shown) for (kind, commands), (_, shown) in itertools.pairwise(BLOCKS) if kind == "sh"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every file of the page, under the name in its first line."""
    place = tmp_path_factory.mktemp("own")
    for kind, text in BLOCKS:
        if kind in ("python", "yaml"):
            file = place / text.partition("\n")[0].removeprefix("# ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return place


def comparable(text: str) -> list[str]:
    """Lines without the spaces at their ends, and without losses, which depend on the interpreter's own source."""
    return [re.sub(r"\d+\.\d+", "N", line.rstrip()) for line in text.splitlines()]


@pytest.mark.parametrize(("commands", "shown"), EXAMPLES, ids=["schedule", "strategy", "growth", "logger"])
def test_the_page_shows_what_its_commands_print(folder, commands, shown):
    printed = ""
    for line in commands.splitlines():
        command, *arguments = shlex.split(line)
        if command == "cat":
            printed += (folder / arguments[0]).read_text()
            continue
        done = run(command, *arguments, cwd=folder)
        assert done.code == 0, done.err
        printed += done.out + done.err
    assert [line for line in comparable(shown) if line not in comparable(printed)] == []


@pytest.mark.parametrize(
    ("key", "name", "problem"),
    [
        ("sampling.strategy", "window.widow", "sampling.strategy=window.widow: cannot be imported"),
        ("scheduler.grow", "growing.lst", "scheduler.grow=growing.lst: cannot be imported"),
        ("scheduler.grow", "builtins.range", "scheduler.grow=builtins.range: must return 4 sources to grow from 2"),
        ("logger.kind", "markdwn", "must be one of wandb, tensorboard, csv, none, or the dotted path of a class"),
    ],
)
def test_a_name_that_cannot_work_is_bad_input(folder, key, name, problem):
    done = call("est-plan", "--config-dir", "conf", "scheduler=last", f"{key}={name}", cwd=folder)
    assert done.code == 2
    assert problem in done.err


def test_a_file_beside_the_configs_cannot_shadow_a_library(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    code = "from est_cli.commands.entry import read_arguments; read_arguments(); import json; json.loads"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=clean_environment(tmp_path))
    assert done.returncode == 0
