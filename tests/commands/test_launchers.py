"""Jobs of a sweep in other processes, and trials that a sweeper proposes: the same folders, table and exit codes."""

import json
import signal
from pathlib import Path

import pytest

from tests.commands.cli import Finished, Process, run, wait_for_steps
from tests.experiments.test_sweep import FAST, statuses

pytestmark = pytest.mark.slow

JOBLIB = (*FAST, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
RANKS = ("trainer=ddp", "trainer.device=cpu", "format=json")


def needs(plugin: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}", reason=f"hydra-{plugin.replace('_', '-')} is not installed")


@pytest.fixture(scope="module")
def side_by_side(place) -> Finished:
    """Three jobs in two processes; one is bad input, one uses a function from a file beside it."""
    needs("joblib_launcher")
    (place / "mine.py").write_text("def sampled(draw, total, kept):\n    return range(kept)\n")
    strategies = "sampling.strategy=random,mine.sampled,mine.smapled"
    return run("est-train", *JOBLIB, strategies, "format=json", cwd=place)


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


def test_a_signal_stops_every_worker_with_a_checkpoint(place):
    needs("joblib_launcher")
    process = Process("est-train", *JOBLIB, "trainer.max_steps=20000", "seed=1,2,3", cwd=place)
    for seed in (1, 2):
        wait_for_steps(place / "outputs" / "est" / "sweep-*seed*" / f"*seed-{seed}", 20)
    done = process.stopped(signal.SIGTERM)
    assert done.code == 75, done.err
    assert "continue with: est-train" in done.err
    summaries = [json.loads(path.read_text()) for path in (place / "outputs").glob("est/sweep-*seed*/*/summary.json")]
    assert [summary["status"] for summary in summaries] == ["stopped"] * 2


def test_a_job_may_have_several_processes(place):
    """Its folder is the job's, it is one of the sweep's group, and only the sweep prints JSON."""
    done = run("est-train", *FAST, *RANKS, "trainer.devices=2", "optimizer.lr=1e-3,1e99", cwd=place)
    jobs = {status: name for name, status in statuses(done).items()}
    assert (sorted(jobs), done.code) == (["done", "failed"], 1), done.err
    folder = Path(done.json["sweep_dir"])
    recorded = (folder / jobs["done"] / "config.yaml").read_text()
    assert "devices: 2" in recorded and f"group: {folder.name}" in recorded
    assert "is not finite" in (folder / jobs["failed"] / "error.txt").read_text()


def test_submitit_runs_jobs_of_one_process_and_of_several(place):
    needs("submitit_launcher")
    done = run("est-train", *FAST, *RANKS, "hydra/launcher=submitit_local", "trainer.devices=1,2", cwd=place)
    assert done.code == 0, done.err
    assert statuses(done) == {"devices-1": "done", "devices-2": "done"}


def test_optuna_proposes_trials_and_finds_them_again(place):
    needs("optuna_sweeper")
    search = (*FAST, "hydra/sweeper=optuna_tpe", "hydra.sweeper.n_trials=3", "optimizer.lr=interval(0.001,0.1)",
              "sampling.strategy=random,mine.smapled", "format=json")  # fmt: skip
    first = run("est-train", *search, cwd=place)
    assert sorted(set(statuses(first).values())) in (["done", "failed"], ["done"]), first.err
    again = run("est-train", *search, cwd=place)
    assert statuses(again) == statuses(first)
    assert again.err.count("done already, skipped") == list(statuses(first).values()).count("done")
