"""Jobs of a sweep in other processes, and trials that a sweeper proposes: the same folders, table and exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.cli import TINY, Finished, clean_environment, run, write_corpus
from tests.experiments.test_sweep import statuses, wait_for_steps

pytestmark = pytest.mark.slow

FAST = ("trainer.max_steps=15", "trainer.eval_every=0", "trainer.checkpoint_every=0")
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def arguments(*overrides: str) -> list[str]:
    return [*TINY, "data=text", "data.path=corpus", *FAST, "-m", *overrides]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    write_corpus(folder / "corpus")
    (folder / "mine.py").write_text("def sampled(draw, total, kept):\n    return range(kept)\n")
    return folder


@pytest.fixture(scope="module")
def side_by_side(place) -> Finished:
    """Three jobs in two processes; one is bad input, one uses a function from a file beside it."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed")
    return mixed_sweep(place)


def mixed_sweep(place: Path) -> Finished:
    overrides = (*JOBLIB, "sampling.strategy=random,mine.sampled,mine.smapled", "format=json")
    return run("est-train", *arguments(*overrides), cwd=place)


def test_joblib_runs_the_jobs_in_two_processes_of_its_own(side_by_side):
    jobs = {"strategy-mine.sampled": "done", "strategy-mine.smapled": "failed", "strategy-random": "done"}
    assert statuses(side_by_side) == jobs, side_by_side.err
    assert side_by_side.code == 2
    assert "sampling.strategy=mine.smapled: cannot be imported" in side_by_side.err


def test_lines_of_jobs_that_run_side_by_side_tell_whose_they_are(side_by_side):
    lines = side_by_side.err.splitlines()
    assert any(line.startswith("strategy-random  done, validation loss") for line in lines)
    assert all("loss" not in line or line.startswith("strategy-") for line in lines)


def test_a_job_elsewhere_records_the_command_of_the_sweep(side_by_side):
    record = json.loads(Path(side_by_side.json["sweep_dir"], "strategy-random", "environment.json").read_text())
    assert record["command"][-1] == "format=json"
    assert "sampling.strategy=random" in record["overrides"]


def test_the_same_command_runs_only_what_failed(side_by_side, place):
    again = mixed_sweep(place)
    assert statuses(again) == statuses(side_by_side)
    assert again.err.count("done already, skipped") == 2, again.err


def test_a_signal_stops_every_worker_with_a_checkpoint(place):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed")
    process = subprocess.Popen(
        [sys.executable, "-m", "est_cli", *arguments(*JOBLIB, "trainer.max_steps=20000", "seed=1,2,3")],
        cwd=place, env=clean_environment(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for seed in (1, 2):
            wait_for_steps(place / "outputs" / "est", f"sweep-*seed*/*seed-{seed}/metrics.jsonl", 20)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, err
    assert "continue with: python -m est_cli" in err
    summaries = [json.loads(path.read_text()) for path in (place / "outputs").glob("est/sweep-*seed*/*/summary.json")]
    assert [summary["status"] for summary in summaries] == ["stopped"] * 2


def test_submitit_runs_the_jobs_of_a_sweep(place):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    done = run("est-train", *arguments("hydra/launcher=submitit_local", "seed=5,6", "format=json"), cwd=place)
    assert done.code == 0, done.err
    assert statuses(done) == {"seed-5": "done", "seed-6": "done"}


@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_a_job_may_have_several_processes(place, launcher):
    """Its folder is the job's, it is one of the sweep's group, and the sweep alone prints JSON."""
    if launcher != "basic":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    ranks = ("trainer=ddp", "trainer.device=cpu", "trainer.devices=2", "optimizer.lr=1e-3,1e99")
    done = run("est-train", *arguments(f"hydra/launcher={launcher}", *ranks, "format=json"), cwd=place)
    jobs = {status: name for name, status in statuses(done).items()}
    assert (sorted(jobs), done.code) == (["done", "failed"], 1), done.err
    folder = Path(done.json["sweep_dir"])
    recorded = (folder / jobs["done"] / "config.yaml").read_text()
    assert "devices: 2" in recorded and f"group: {folder.name}" in recorded
    assert "is not finite" in (folder / jobs["failed"] / "error.txt").read_text()
    if launcher == "basic":
        again = run("est-train", *arguments(f"hydra/launcher={launcher}", *ranks, "format=json"), cwd=place)
        assert again.err.count("done already, skipped") == 1, again.err


def test_optuna_proposes_trials_and_finds_them_again(place):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    search = arguments("hydra/sweeper=optuna_tpe", "hydra.sweeper.n_trials=3", "optimizer.lr=interval(0.001,0.1)",
                       "sampling.strategy=random,mine.smapled", "format=json")  # fmt: skip
    first = run("est-train", *search, cwd=place)
    assert sorted(set(statuses(first).values())) in (["done", "failed"], ["done"]), first.err
    again = run("est-train", *search, cwd=place)
    assert statuses(again) == statuses(first)
    assert again.err.count("done already, skipped") == list(statuses(first).values()).count("done")


@pytest.mark.parametrize(
    ("override", "said"),
    [("hydra/launcher=joblob", "did you mean 'joblib'"), ("hydra/sweeper=optuna_tp", "did you mean 'optuna_tpe'")],
)
def test_a_launcher_that_there_is_not_is_bad_input(tmp_path, override, said):
    done = run("est-train", *arguments(override, "seed=0,1"), cwd=tmp_path)
    assert (done.code, said in done.err) == (2, True), done.err
    assert not (tmp_path / "outputs").exists()
