"""Signals, jobs with ids, numbers that go wrong and disks that are full, through the real command."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from est_cli.errors import RunFailed
from est_cli.runs.directory import RunDirectory
from est_cli.runs.stopping import StopRequest, handlers_restored, quit_until_training_begins
from tests.commands.cli import ON_CORPUS, Process, clean_environment, metrics, run, train, wait_for_steps


@pytest.fixture
def handlers():
    """Puts the handlers of signals back."""
    with handlers_restored():
        yield


def test_ctrl_c_asks_once_and_quits_the_second_time(handlers):
    request = StopRequest()
    signal.raise_signal(signal.SIGINT)
    assert request()
    signal.raise_signal(signal.SIGTERM)  # a scheduler that asks again does not cut the step
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR2"])
def test_a_signal_before_training_is_named(handlers, name):
    quit_until_training_begins()
    with pytest.raises(RunFailed, match=f"{name} came before training began"):
        signal.raise_signal(signal.Signals[name])
    request = StopRequest()
    signal.raise_signal(signal.Signals[name])
    assert request()


def test_nohup_keeps_its_meaning(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.slow
def test_a_run_that_is_not_finite_names_the_step_and_the_replay_that_repeats_it(place):
    failed = train(
        place, "trainer.max_steps=300", "optimizer.lr=1e30", "optimizer.grad_clip=null", "run_id=bad", code=1
    )
    run_dir = place / "outputs" / "est" / "bad"
    assert "Traceback" not in failed.err and failed.err.count("is not finite") == 1
    assert "is not finite" in (run_dir / "error.txt").read_text()
    [folder] = (run_dir / "nonfinite").iterdir()
    assert f"replay={folder}" in failed.err
    kept = json.loads((folder / "step.json").read_text())
    seen = run("est-train", f"replay={folder / 'step.json'}", "format=json", cwd=place).json
    assert (seen["step"], seen["grad_norm"]) == (kept["step"], None)
    kept["config"]["trainer"] |= {"strategy": "fsdp", "devices": 2, "shard_size": 2}
    (folder / "step.json").write_text(json.dumps(kept))
    assert run("est-train", f"replay={folder}", "format=json", cwd=place).json == seen, "one process replays many"


@pytest.mark.slow
def test_secrets_reach_no_file_of_a_run(place):
    secrets = {"WANDB_API_KEY": "k" * 33 + "secret1", "HF_TOKEN": "hf_secret2secret2"}
    done = train(place, "logger=wandb", "trainer.max_steps=8", "run_id=secrets", **secrets)
    files = [path for path in (place / "outputs" / "est" / "secrets").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in secrets.values()), path
    assert not any(secret in done.out + done.err for secret in secrets.values())


def test_one_run_is_trained_by_one_process(place):
    """A second start of the same job is told who trains it, and spoils nothing."""
    command = (*ON_CORPUS, "trainer.max_steps=20000", "run_id=twice")
    first = Process("est-train", *command, cwd=place)
    folder = place / "outputs" / "est" / "twice"
    wait_for_steps(folder, 5)
    told = run("est-train", *command, cwd=place)
    assert told.code == 2, told.err
    assert f"run_id=twice: process {first.pid} on " in told.err
    assert "trains this run at the moment" in told.err
    assert first.stopped(signal.SIGTERM).code == 75
    steps = [record["step"] for record in metrics(folder)]
    assert steps == list(range(len(steps)))
    assert not (folder / "error.txt").exists()


ODD_CALLS = {
    "nobody reads what it prints": (">&-", {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}),
    "nobody reads what it says": ("2>&-", {"MATPLOTLIBRC": "matplotlibrc"}),
    "standard output is on a full disk": (">/dev/full", {}),
    "standard error is on a full disk": ("2>/dev/full", {}),
}
"""Redirections of a shell; two have environment variables that break matplotlib besides."""


@pytest.mark.parametrize("odd", ODD_CALLS)
def test_a_run_is_done_whoever_reads_what_it_says(odd, place):
    """What it computes is in its folder; no message and no figure may end it."""
    redirection, environment = ODD_CALLS[odd]
    (place / "matplotlibrc").write_bytes(b"\xff\xfe not UTF-8 \x81")
    folder = place / odd.replace(" ", "_")
    arguments = [*ON_CORPUS, "trainer.max_steps=4", f"hydra.run.dir={folder}"]
    command = shlex.join([sys.executable, "-m", "est_cli", *arguments])
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}"], cwd=place, env=clean_environment(place, **environment)
    )
    assert done.returncode == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"


def test_a_reader_that_has_left_is_no_failure(place):
    command = shlex.join([sys.executable, "-c", "from est_cli.commands.plan import main; main()"])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} | true"], env=clean_environment(place))
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("error", "bad_input"),
    [("failed: step 7: the loss is not finite\n", False), ("error: seed=zero: must be an integer\n", True)],
)
def test_a_job_that_failed_is_not_bad_input(tmp_path, error, bad_input):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "error.txt").write_text(error)
    assert RunDirectory(tmp_path).has_bad_input is bad_input


def test_a_second_run_in_one_slurm_allocation_has_a_name_of_its_own(place):
    job, overrides = {"SLURM_JOB_ID": "77"}, ("trainer.max_steps=4", "name=slurm")
    runs = [train(place, *overrides, f"seed={seed}", **job).json["run_dir"] for seed in (0, 1)]
    assert [Path(folder).name for folder in runs] == ["77", "77-2"]
    requeued = train(place, *overrides, code=2, **job, SLURM_RESTART_COUNT="1")
    assert "run_id=77: this run is finished" in requeued.err
