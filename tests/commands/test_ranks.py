"""est-train in several processes, started by torchrun or by itself, as people start and lose them.

All runs are one run: 15 steps of 4 sequences, however many ranks share them.
"""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from est_cli.config import TrainerConfig
from est_cli.errors import UserError
from est_cli.runs import launcher
from est_cli.training.device import available_device
from tests.commands.cli import ON_CORPUS, Finished, call, clean_environment, metrics, run

ROOT = Path(__file__).parents[2]
CONFIG = (
    *ON_CORPUS, "trainer.max_steps=15", "trainer.eval_every=5", "sampling.strategy=tests.commands.ranks.acting",
    "format=json",
)  # fmt: skip
ALONE = (*CONFIG, "trainer.batch_size=4")
SHARED = ("-m", "est_cli", *CONFIG, "trainer=ddp", "trainer.device=cpu")
TWO = (*CONFIG, "trainer=fsdp", "trainer.device=cpu", "trainer.devices=2")


def start(place: Path, *overrides: str, act: str = "nothing:-1", **environment: str) -> Finished:
    """est-train, which may start two ranks."""
    return run("est-train", *overrides, cwd=place, ACT=act, **environment)


def torchrun(place: Path, *overrides: str, act: str = "nothing:-1", restarts: int = 0) -> Finished:
    """Two ranks."""
    command = (
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}", *SHARED, *overrides,
    )  # fmt: skip
    environment = clean_environment(place, ACT=act)
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, timeout=180)
    return Finished(done.returncode, done.stdout, done.stderr)


def run_dir(place: Path, run_id: str) -> Path:
    return place / "outputs" / "est" / run_id


def assert_same_curve(place: Path, found: str, expected: str) -> None:
    """Step by step: the same data and the same numbers, to the rounding of another order of sums."""
    ours, theirs = metrics(run_dir(place, found)), metrics(run_dir(place, expected))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(15))
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        np.testing.assert_allclose(*([r[key] or 0.0 for r in records] for records in (ours, theirs)), rtol=0, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[key] == b[key] for key in a if "flops" in key or key == "tokens")


@pytest.fixture(scope="module")
def whole(place) -> str:
    """One process, never interrupted."""
    assert start(place, *ALONE, "run_id=whole").code == 0
    return "whole"


@pytest.fixture(scope="module")
def stopped(place) -> Finished:
    """Two ranks that est-train started, and Ctrl-C at step 5."""
    fake_wandb = ROOT / "tests" / "tracking" / "fake_wandb"
    return start(
        place, *TWO, "run_id=stopped", "logger=wandb", act="SIGINT:0",
        PYTHONPATH=f"{ROOT}:{fake_wandb}", FAKE_WANDB_CALLS=str(place / "wandb-calls"),
    )  # fmt: skip


def test_two_ranks_are_one_run(place, stopped):
    """One exit code, one object on standard output, one display, one directory, one line a step, one W&B run."""
    assert stopped.code == 75, stopped.err
    assert stopped.json["status"] == "stopped"
    assert stopped.err.count("chosen for cpu") == stopped.err.count("continue with: ") == 1
    assert stopped.err.count("data: tokenized") == 1
    assert [path.name for path in (place / "outputs" / "est").iterdir() if "stopped" in path.name] == ["stopped"]
    steps = [record["step"] for record in metrics(run_dir(place, "stopped"))]
    assert steps == list(range(stopped.json["steps"]))
    assert 5 <= stopped.json["steps"] < 15
    calls = [json.loads(line)["called"] for line in (place / "wandb-calls").read_text().splitlines()]
    assert calls.count("init") == calls.count("finish") == 1
    assert calls.count("log") == len(steps)


def test_another_global_batch_is_refused_with_the_values_that_keep_it(place, stopped):
    done = call("est-train", *CONFIG, "run_id=stopped", cwd=place)
    assert done.code == 2
    assert "trainer.devices: was 2, is 1" in done.err
    assert "trainer.devices=1 by trainer.batch_size=2 trainer.grad_accum=2" in done.err


def test_two_ranks_and_then_one_train_as_one(place, stopped, whole):
    done = start(place, *ALONE, "run_id=stopped")
    assert done.code == 0, done.err
    assert_same_curve(place, "stopped", whole)


def test_one_rank_and_then_two_that_torchrun_starts_twice_train_as_one(place, whole):
    """Rank 1 is killed at step 5; both go on from the checkpoint."""
    assert start(place, *ALONE, "run_id=grown", act="SIGTERM:0:3").code == 75
    done = torchrun(place, "run_id=grown", "trainer.checkpoint_every=2", act="SIGKILL:1", restarts=1)
    assert done.code == 0, done.err
    assert done.json["status"] == "done"
    assert len(json.loads((run_dir(place, "grown") / "environment.json").read_text())["earlier_starts"]) == 2
    assert_same_curve(place, "grown", whole)


def test_torchruns_workers_tell_bad_input_once(place, whole):
    """A finished run is one that only rank 0 can know of; the others must not wait for it."""
    done = torchrun(place, "run_id=whole")
    assert done.code == 1, "torchrun's own"
    assert done.err.count("error: run_id=whole: this run is finished") == 1
    assert done.err.count("exitcode  : 2") >= 1
    assert "Traceback" not in done.err.partition("torch/distributed")[0]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_and_a_slow_checkpoint_does_not(place):
    """Both ranks wait for the checkpoint of step 4 longer than a collective may take; then rank 1 hangs in step 5."""
    done = start(
        place, *TWO, "trainer=ddp", "run_id=hangs", "trainer.collective_timeout_s=6", "trainer.checkpoint_every=4",
        act="hang:1", SLOW_S="8",
    )  # fmt: skip
    assert done.code == 1
    assert "step 5: another process of the run has not answered within trainer.collective_timeout_s" in done.err
    assert "continue with: " in done.err
    assert [path.name for path in (run_dir(place, "hangs") / "checkpoints").iterdir()] == ["step-00000004"]


def test_an_error_of_any_rank_ends_the_run_and_is_told_once(place):
    done = start(place, *TWO, "run_id=broken", act="raise:1")
    assert done.code == 1
    assert done.err.count("RuntimeError: rank 1 breaks") == 1
    assert done.err.count("Traceback") == 1
    assert "another process" not in done.err
    assert "RuntimeError: rank 1 breaks" in (run_dir(place, "broken") / "error.txt").read_text()
    assert len(metrics(run_dir(place, "broken"))) == 5


def test_a_file_in_the_current_folder_cannot_take_a_librarys_place_in_a_rank(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launcher.launch(2, ["-m", "est_cli", "--help"]) == 0


@pytest.mark.slow
def test_a_machine_that_is_lost_costs_the_steps_since_the_last_checkpoint(place, whole):
    """Two of torchrun's agents, a rank each; the second loses its power at step 5, and one process goes on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=machines", *SHARED,
        "trainer.checkpoint_every=2",
    ]  # fmt: skip
    environment = clean_environment(place, ACT="power-off:1")
    agents = [subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True) for _ in "12"]
    try:
        said = [agent.communicate(timeout=180)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert sorted(agent.returncode for agent in agents) == [-9, 1], said
    assert any("another process of the run has ended" in err for err in said)
    assert start(place, *ALONE, "run_id=machines").code == 0
    assert_same_curve(place, "machines", whole)


def test_a_rank_that_is_killed_while_it_writes_costs_the_steps_since_the_last_checkpoint(place, whole):
    """Two ranks share the state; rank 1 dies while the checkpoint of step 6 is written, and one process goes on."""
    done = start(place, *TWO, "run_id=writing", "trainer.checkpoint_every=2", act="die-writing:1")
    assert done.code == 1
    assert "SIGKILL" in done.err
    for told in (done.err, (run_dir(place, "writing") / "error.txt").read_text()):
        assert "another process of the run has ended" in told
    checkpoints = run_dir(place, "writing") / "checkpoints"
    found = sorted(path.name for path in checkpoints.iterdir())
    assert found == [".writing-step-00000006", "step-00000002", "step-00000004"]
    assert (checkpoints / "step-00000004" / "optimizer-00002-of-00002.safetensors").exists()
    assert start(place, *ALONE, "run_id=writing").code == 0
    assert_same_curve(place, "writing", whole)


@pytest.mark.slow
def test_torchrun_that_is_stopped_leaves_a_checkpoint(place):
    """Its workers exit with 75 and torchrun itself with 1."""
    done = torchrun(place, "run_id=preempted", act="SIGTERM:1")
    assert done.code == 1
    assert "continue with: " in done.err
    summary = json.loads((run_dir(place, "preempted") / "summary.json").read_text())
    assert summary["status"] == "stopped"
    newest = max(path.name for path in (run_dir(place, "preempted") / "checkpoints").iterdir())
    assert newest == f"step-{summary['steps']:08d}"


def test_no_rank_ends_while_rank_0_writes_its_checkpoint(place):
    """torchrun takes the first that leaves with 75 for a failure, and kills the others half a minute later."""
    done = torchrun(place, "run_id=slow", "trainer.checkpoint_every=0", act="stop-itself:1")
    assert done.err.count("exitcode  : 75") >= 1
    written = run_dir(place, "slow") / "summary.json"
    assert json.loads(written.read_text())["status"] == "stopped"
    assert (place / "ended-1").stat().st_mtime >= written.stat().st_mtime


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (TrainerConfig(), "trainer.strategy=single: 2 processes were started; give trainer=ddp"),
        (TrainerConfig(strategy="ddp", devices=3), "trainer.devices=3: 2 processes were started; leave it out"),
    ],
)
def test_a_config_that_is_not_for_the_started_processes_is_refused(monkeypatch, trainer, message):
    """Else each would train a run of its own, in one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=re.escape(message)):
        available_device(trainer, "auto")


@pytest.mark.parametrize(
    ("codes", "code"),
    [((0, 0), 0), ((75, 75), 75), ((1, 2), 2), ((-9, 1), 1), ((130, 1), 130), ((75, 1), 1), ((75, -15), 75)],
)
def test_the_exit_code_is_that_of_the_cause(codes, code):
    assert launcher._exit_code(codes) == code
