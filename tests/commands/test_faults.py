"""Signals, jobs that are requeued, numbers that go wrong and disks that are full, through the real command."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from est_cli.errors import RunFailed
from est_cli.runs.directory import RunDirectory
from est_cli.runs.stopping import STOP_SIGNALS, StopRequest, quit_until_training_begins
from tests.commands.cli import TINY, clean_environment, metrics, run, without_speed, write_corpus
from tests.commands.test_train import start, wait_for_steps

OVERRIDES = (
    "trainer.max_steps=300",
    "trainer.eval_every=100",
    "trainer.checkpoint_every=40",
    "trainer.save_final=full",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "corpus")
    return folder


@pytest.mark.slow
def test_a_requeued_job_goes_on_with_the_same_command_to_the_same_bits(place, monkeypatch):
    """USR1, as Slurm sends before it takes the machine; the id of the run is the job's. Then Ctrl-C, and torchrun's."""
    ends = []
    for name, value, number in (
        ("SLURM_JOB_ID", "4711", signal.SIGUSR1), ("TORCHELASTIC_RUN_ID", "elastic", signal.SIGINT),
    ):  # fmt: skip
        monkeypatch.setattr("tests.commands.test_train.clean_environment", _with(name, value))
        process = start(place, *OVERRIDES)
        run_dir = place / "outputs" / "est" / value
        wait_for_steps(run_dir, 20)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 75, err
        assert "continue with:" in err
        again = start(place, *OVERRIDES)
        assert again.wait(timeout=300) == 0
        assert json.loads((run_dir / "summary.json").read_text())["status"] == "done"
        assert [record["step"] for record in metrics(run_dir)] == list(range(300))
        ends.append(without_speed(metrics(run_dir)))
    assert ends[0] == ends[1]


def _with(name: str, value: str):
    return lambda place: {**clean_environment(place), name: value}


def test_ctrl_c_asks_once_and_quits_the_second_time():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        request = StopRequest()
        signal.raise_signal(signal.SIGINT)
        assert request()
        signal.raise_signal(signal.SIGTERM)  # a scheduler that asks again does not cut the step
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_run_that_is_not_finite_names_the_step_and_the_replay_that_repeats_it(place):
    blows_up = ("optimizer.lr=1e30", "optimizer.grad_clip=null", "run_id=bad")
    process = start(place, *OVERRIDES, *blows_up)
    _, err = process.communicate(timeout=300)
    run_dir = place / "outputs" / "est" / "bad"
    assert process.returncode == 1, err
    assert "Traceback" not in err and err.count("is not finite") == 1
    assert "is not finite" in (run_dir / "error.txt").read_text()
    [folder] = (run_dir / "nonfinite").iterdir()
    assert f"replay={folder}" in err
    seen = run("est-train", f"replay={folder / 'step.json'}", "format=json", cwd=place).json
    assert seen["step"] == json.loads((folder / "step.json").read_text())["step"]
    assert seen["grad_norm"] is None

    kept = json.loads((folder / "step.json").read_text())
    kept["config"]["trainer"] |= {"strategy": "ddp", "devices": 2, "shard": True}
    (folder / "step.json").write_text(json.dumps(kept))
    assert run("est-train", f"replay={folder}", "format=json", cwd=place).json == seen, "one process replays many"


def test_a_replay_of_something_else_is_refused(place):
    done = run("est-train", "replay=corpus", "trainer.max_steps=4", cwd=place)
    assert (done.code, "goes with format" in done.err) == (2, True)
    done = run("est-train", "replay=corpus", cwd=place)
    assert (done.code, "replay=corpus: must be a folder" in done.err) == (2, True)
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_secrets_reach_no_file_of_a_run(place):
    secrets = {"WANDB_API_KEY": "k" * 33 + "secret1", "HF_TOKEN": "hf_secret2secret2"}
    done = run(
        "est-train", "model=micro", "tokenizer=byte", "data=text", "data.path=corpus", "data.seq_len=16",
        "logger=wandb", "trainer.max_steps=8", "trainer.batch_size=2", "trainer.device=cpu", "run_id=secrets",
        cwd=place, **secrets,
    )  # fmt: skip
    assert done.code == 0, done.err
    files = [path for path in (place / "outputs" / "est" / "secrets").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in secrets.values()), path
    assert not any(secret in done.out + done.err for secret in secrets.values())


def test_one_run_is_trained_by_one_process(place):
    """A second start of the same job is told who trains it, and spoils nothing."""
    first = start(place, "trainer.max_steps=20000", "run_id=twice")
    folder = place / "outputs" / "est" / "twice"
    wait_for_steps(folder, 5)
    second = start(place, "trainer.max_steps=20000", "run_id=twice")
    _, told = second.communicate(timeout=300)
    assert second.returncode == 2, told
    assert f"run_id=twice: process {first.pid} on " in told
    assert "trains this run at the moment" in told
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=300) == 75
    steps = [record["step"] for record in metrics(folder)]
    assert steps == list(range(len(steps)))
    assert not (folder / "error.txt").exists()


ODD_CALLS = {
    "standard output is closed": (">&-", {}),
    "standard error is closed": ("2>&-", {}),
    "standard error is on a full disk": ("2>/dev/full", {}),
    "standard output is on a full disk": (">/dev/full", {}),
    "called from a notebook": ("", {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}),
    "a broken matplotlibrc": ("", {"MATPLOTLIBRC": "matplotlibrc"}),
}


@pytest.mark.parametrize("call", ODD_CALLS)
def test_a_run_is_done_whoever_reads_what_it_says(call, place):
    """What it computes is in its folder; no message and no figure may end it."""
    redirection, environment = ODD_CALLS[call]
    (place / "matplotlibrc").write_bytes(b"\xff\xfe not UTF-8 \x81")
    arguments = [*TINY, "data=text", "data.path=corpus", "trainer.max_steps=4", f"name={call.replace(' ', '_')}"]
    command = shlex.join([sys.executable, "-m", "est_cli", *arguments, "run_id=r"])
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}"], cwd=place, env=clean_environment(place, **environment)
    )
    [folder] = (place / "outputs" / call.replace(" ", "_")).iterdir()
    assert done.returncode == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"


def test_a_reader_that_has_left_is_no_failure(place):
    command = shlex.join([sys.executable, "-c", "from est_cli.commands.plan import main; main()"])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} | true"], env=clean_environment(place))
    assert done.returncode == 0


def test_a_summary_that_a_power_loss_emptied_is_none(tmp_path):
    (tmp_path / "summary.json").touch()
    assert RunDirectory(tmp_path).summary() == {}


def test_a_job_that_failed_is_not_bad_input(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "error.txt").write_text("failed: step 7: the loss is not finite\n")
    assert not RunDirectory(tmp_path).has_bad_input
    (tmp_path / "error.txt").write_text("error: seed=zero: must be an integer\n")
    assert RunDirectory(tmp_path).has_bad_input


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR2"])
def test_a_signal_before_training_is_named(name):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        quit_until_training_begins()
        with pytest.raises(RunFailed, match=f"{name} came before training began"):
            signal.raise_signal(signal.Signals[name])
        request = StopRequest()
        signal.raise_signal(signal.Signals[name])
        assert request()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_nohup_keeps_its_meaning():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        StopRequest()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_run_in_one_slurm_allocation_has_a_name_of_its_own(place):
    job = {"SLURM_JOB_ID": "77"}
    arguments = [*TINY, "data=text", "data.path=corpus", "trainer.max_steps=4", "name=slurm", "format=json"]
    runs = [run("est-train", *arguments, f"seed={seed}", cwd=place, **job).json["run_dir"] for seed in (0, 1)]
    assert [Path(folder).name for folder in runs] == ["77", "77-2"]
    requeued = run("est-train", *arguments, cwd=place, **job, SLURM_RESTART_COUNT="1")
    assert (requeued.code, "run_id=77: this run is finished" in requeued.err) == (2, True)


@pytest.mark.parametrize(
    ("environment", "override", "message"),
    [
        ({"WORLD_SIZE": "2"}, "seed=0", "WORLD_SIZE=2: RANK, MASTER_ADDR, MASTER_PORT must be set too"),
        ({"WORLD_SIZE": "two"}, "seed=0", "WORLD_SIZE=two: must be a number of processes"),
        (
            {"CXX": "no-such-compiler"},
            "trainer.compile=true",
            "trainer.compile=true: torch.compile needs a C++ compiler",
        ),
    ],
)
def test_an_environment_that_cannot_work_is_told(environment, override, message, place):
    done = run("est-train", "logger=none", override, cwd=place, **environment)
    assert (done.code, message in done.err, "Traceback" in done.err) == (2, True, False), done.err
