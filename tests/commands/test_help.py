"""--help: answers, and explains the keys of the config that it shows."""

import argparse

import pytest

from est_cli.commands.entry import help_text
from est_cli.composition.composer import Composer
from est_cli.errors import UserError

COMMANDS = ("train", "plan", "prepare", "eval", "generate", "export", "report", "bench")


def text(command: str, *overrides: str) -> str:
    arguments = argparse.Namespace(overrides=list(overrides), config_name=None, config_dir=None)
    with Composer(command, arguments) as composer:
        return help_text(composer)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples_and_commented_keys(command):
    shown = text(command)
    assert "Examples" in shown and "format: text " in shown and "json: one JSON object" in shown
    assert "$" not in shown.replace("${", "")


def test_a_key_has_the_comment_of_the_option_that_is_chosen():
    lines = text("train", "data=text", "data.path=corpus").splitlines()
    assert any(line.startswith("  max_steps: auto ") and line.endswith("# optimizer steps") for line in lines)
    assert any(line.startswith("  path: corpus ") and "a file, folder or glob" in line for line in lines)


def test_a_mistake_beside_help_is_told():
    with pytest.raises(UserError, match="did you mean 'tinyllama'"):
        text("train", "model=tinylama")
