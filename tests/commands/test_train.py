"""est-train: whole runs, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.commands.cli import TINY, clean_environment, metrics, run, without_speed, write_corpus

METRIC_KEYS = [
    "step", "tokens", "stage", "train/loss", "train/lr", "train/grad_norm", "val/loss",
    "subnet/heads", "subnet/mlp", "subnet/layers",
    "flops/step", "flops/total", "flops/full_total", "flops/saved", "flops/saved_blocks",
    "perf/step_s", "perf/tokens_per_s", "perf/mfu",
]  # fmt: skip
SUMMARY_KEYS = {
    "status", "steps", "tokens", "val_loss", "flops_total", "flops_full_total", "flops_saved", "flops_saved_blocks",
    "train_s", "peak_memory_bytes", "skipped_steps", "stages", "run_dir",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    return folder


def train(place: Path, *overrides: str, code: int = 0, **environment: str):
    done = run("est-train", *TINY, "data=text", "data.path=corpus", "format=json", *overrides, cwd=place, **environment)
    assert done.code == code, done.err
    return done


@pytest.fixture(scope="module")
def three_stages(place):
    return train(place, "trainer.max_steps=15", "trainer.eval_every=5").json


def test_standard_output_is_the_summary(three_stages):
    assert three_stages.keys() == SUMMARY_KEYS
    assert three_stages["status"] == "done"
    assert [(s["first_step"], s["last_step"]) for s in three_stages["stages"]] == [(0, 1), (2, 6), (7, 14)]


def test_every_metric_is_written_for_every_step(three_stages):
    records = metrics(Path(three_stages["run_dir"]))
    assert [r["step"] for r in records] == list(range(15))
    assert all(list(r) == METRIC_KEYS for r in records)
    assert [r["step"] for r in records if r["val/loss"] is not None] == [4, 9, 14]
    assert records[-1]["val/loss"] == three_stages["val_loss"]
    assert [r["stage"] for r in records] == [1] * 2 + [2] * 5 + [3] * 8
    assert records[-1]["flops/total"] == three_stages["flops_total"] == sum(s["flops"] for s in three_stages["stages"])


def test_the_run_directory_holds_what_the_contract_says(three_stages):
    folder = Path(three_stages["run_dir"])
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "report"} <= names
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 15


def test_est_eval_repeats_the_runs_own_loss(three_stages, place):
    facts = run("est-eval", f"run={three_stages['run_dir']}", "format=json", cwd=place).json
    assert facts["val_loss"] == three_stages["val_loss"]
    assert facts["step"] == 14
    assert facts["perplexity"] == pytest.approx(np.exp(facts["val_loss"]))


def test_equal_configs_give_equal_metrics(three_stages, place):
    again = train(place, "trainer.max_steps=15", "trainer.eval_every=5").json
    first, second = (without_speed(metrics(Path(r["run_dir"]))) for r in (three_stages, again))
    assert first == second


def test_est_plan_prints_the_indices_that_the_run_used(three_stages, place):
    """The gradient that reached a row tells that it was sampled: with freeze, only sampled rows move."""
    from safetensors.numpy import load_file

    common = ("trainer.max_steps=9", "optimizer.unsampled=freeze", "trainer.checkpoint_every=1", "checkpoint.keep=99")
    folder = Path(train(place, *common).json["run_dir"])
    before, after = (load_file(folder / "checkpoints" / f"step-{n:08d}" / "model.safetensors") for n in (4, 5))
    plan = run(
        "est-plan", *TINY, "data=text", "data.path=corpus", *common, "step=4", "format=json", cwd=place
    ).json  # fmt: skip
    for position, layer in enumerate(plan["layers"]):
        name = f"blocks.{layer}.mlp.down.weight"
        moved = np.flatnonzero((before[name] != after[name]).any(axis=1))
        assert moved.tolist() == plan["neurons"][position]


def test_masked_execution_trains_the_same_model(three_stages, place):
    masked = train(place, "trainer.max_steps=15", "trainer.eval_every=5", "kernels=masked").json
    ours, theirs = (metrics(Path(r["run_dir"])) for r in (three_stages, masked))
    assert [r["flops/step"] for r in ours] == [r["flops/step"] for r in theirs]
    np.testing.assert_allclose([r["train/loss"] for r in ours], [r["train/loss"] for r in theirs], rtol=1e-4)


def test_bf16_follows_fp32(three_stages, place):
    records = metrics(Path(train(place, "trainer.max_steps=15", "trainer.precision=bf16").json["run_dir"]))
    expected = metrics(Path(three_stages["run_dir"]))
    np.testing.assert_allclose([r["train/loss"] for r in records], [r["train/loss"] for r in expected], rtol=0.02)


def test_a_finished_run_is_refused(place):
    train(place, "trainer.max_steps=8", "run_id=once")
    done = train(place, "trainer.max_steps=8", "run_id=once", code=2)
    assert "finished" in done.err


def test_a_stopped_run_continues_to_the_same_bits(place):
    overrides = ("trainer.max_steps=400", "trainer.eval_every=100", "trainer.checkpoint_every=50")
    whole = Path(train(place, *overrides, "run_id=whole").json["run_dir"])
    process = start(place, *overrides, "run_id=stopped")
    stopped = place / "outputs" / "est" / "stopped"
    wait_for_steps(stopped, 20)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "run_id=stopped" in err
    train(place, *overrides, "run_id=stopped")
    assert without_speed(metrics(stopped)) == without_speed(metrics(whole))
    assert final_weights(stopped) == final_weights(whole)


def test_a_killed_run_continues_to_the_same_bits(place):
    overrides = ("trainer.max_steps=400", "trainer.eval_every=100", "trainer.checkpoint_every=7")
    whole = Path(train(place, *overrides, "run_id=unharmed").json["run_dir"])
    killed = place / "outputs" / "est" / "killed"
    for steps in (30, 90):
        process = start(place, *overrides, "run_id=killed")
        wait_for_steps(killed, steps)
        process.kill()
        process.communicate()
    train(place, *overrides, "run_id=killed")
    assert without_speed(metrics(killed)) == without_speed(metrics(whole))
    assert final_weights(killed) == final_weights(whole)


def test_an_unfinished_run_of_another_config_is_refused(place):
    process = start(place, "trainer.max_steps=4000", "run_id=other")
    wait_for_steps(place / "outputs" / "est" / "other", 3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    done = train(place, "trainer.max_steps=4000", "run_id=other", "optimizer.lr=0.02", code=2)
    assert "optimizer.lr: was 0.01, is 0.02" in done.err


def start(place: Path, *overrides: str) -> subprocess.Popen:
    arguments = [*TINY, "data=text", "data.path=corpus", "format=json", *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "est_cli", *arguments], cwd=place, env=clean_environment(place),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_steps(run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.005)
    raise AssertionError(f"{run_dir} never reached {steps} steps: {os.listdir(run_dir.parent)}")


def final_weights(run_dir: Path) -> dict[str, bytes]:
    newest = max((run_dir / "checkpoints").iterdir())
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.mark.slow
def test_a_short_run_on_the_standard_library_learns(tmp_path):
    """Well below the unigram entropy: the loss of a model that knows each token's frequency and nothing else."""
    common = ("model=micro", "data.seq_len=64", "logger=none", "trainer.device=cpu")
    summary = run(
        "est-train", *common, "trainer.max_steps=800", "trainer.batch_size=16", "optimizer.lr=3e-3",
        "trainer.eval_tokens=16384", "trainer.eval_every=0", "trainer.checkpoint_every=0", "format=json", cwd=tmp_path,
    ).json  # fmt: skip
    prepared = run("est-data", *common, "format=json", cwd=tmp_path).json
    assert summary["val_loss"] < 0.9 * prepared["splits"]["val"]["unigram_entropy_nats"]
