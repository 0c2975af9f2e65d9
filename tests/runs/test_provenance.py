"""environment.json: enough to repeat a run, and no secret."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from est_cli.runs.provenance import git_state, write_environment
from tests.commands.cli import train

ROOT = Path(__file__).parents[2]


def test_a_start_tells_code_packages_machine_and_command_and_no_environment_variable(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret-of-mine")
    write_environment(tmp_path / "environment.json", ["seed=1"])
    text = (tmp_path / "environment.json").read_text()
    record = json.loads(text)
    assert record["overrides"] == ["seed=1"]
    assert record["command"] == sys.argv
    assert record["python"] == platform.python_version()
    assert {"torch", "numpy", "hydra-core"} <= record["packages"].keys()
    assert record["machine"]["cpu_count"] > 0
    assert "secret-of-mine" not in text


def test_a_run_that_continues_keeps_the_record_of_its_first_start(tmp_path):
    path = tmp_path / "environment.json"
    for overrides in (["seed=1"], ["seed=2"], ["seed=3"]):
        write_environment(path, overrides)
    record = json.loads(path.read_text())
    assert [record["overrides"], *(start["overrides"] for start in record["earlier_starts"])] == [
        ["seed=3"], ["seed=1"], ["seed=2"],
    ]  # fmt: skip


def test_the_commit_is_that_of_the_checkout_and_outside_of_one_there_is_none(tmp_path):
    assert git_state(tmp_path) is None
    try:
        git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    assert git_state(ROOT / "est_cli")["commit"] == commit


def test_trainer_threads_is_what_a_run_computes_with(place):
    """Torch itself would take one, as OMP_NUM_THREADS says."""
    done = train(place, "trainer.max_steps=8", "trainer.threads=2")
    recorded = json.loads(Path(done.json["run_dir"], "environment.json").read_text())
    assert recorded["machine"]["threads"] == 2
