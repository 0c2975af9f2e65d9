"""A person's own schedule and sampling strategy: functions in a file beside the configs, no fork, no installation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.cli import TINY, clean_environment, metrics, write_corpus

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def example(language: str, containing: str) -> str:
    """The README's only block of code in that language that contains those words."""
    blocks = [block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in block]
    assert len(blocks) == 1, f"README has {len(blocks)} {language} blocks with {containing}"
    return blocks[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the README tells a person to write."""
    place = tmp_path_factory.mktemp("own")
    write_corpus(place / "corpus")
    (place / "mine.py").write_text(example("python", "def rolling"))
    (place / "conf" / "scheduler").mkdir(parents=True)
    (place / "conf" / "scheduler" / "warm.yaml").write_text(example("yaml", "mine.warm_then_layers"))
    return place


def installed(command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Call as the installed command does, which unlike python -c does not put the current directory on sys.path."""
    code = f"from est_cli.commands.{command} import main; main()"
    _, *own = example("sh", "--config-dir").split()
    small = ("trainer.max_steps=10", *TINY, "data=text", "data.path=corpus")
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *own, *small, *arguments],
        cwd=cwd, env=clean_environment(cwd), capture_output=True, text=True,
    )  # fmt: skip


def test_own_functions_and_configs_decide_a_run(folder):
    done = installed("train", "hydra.run.dir=run", "trainer.eval_every=0", "trainer.checkpoint_every=0", cwd=folder)
    assert done.returncode == 0, done.stderr
    records = metrics(folder / "run")
    assert [r["stage"] for r in records] == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert [r["subnet/layers"] for r in records] == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1]


def test_the_plan_shows_what_an_own_strategy_samples(folder):
    done = installed("plan", "step=4", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "layers 2-3" in done.stdout  # the third draw of stage 2


def test_an_own_function_that_is_not_there_is_bad_input(folder):
    done = installed("plan", "sampling.strategy=mine.roling", cwd=folder)
    assert done.returncode == 2
    assert "sampling.strategy=mine.roling" in done.stderr


def test_a_file_beside_the_configs_takes_no_librarys_place(folder, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    code = "from est_cli.commands.entry import read_arguments; read_arguments(); import json; json.loads"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=clean_environment(tmp_path))
    assert done.returncode == 0
