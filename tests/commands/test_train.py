"""est-train: whole runs, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.commands.cli import ON_CORPUS, call, clean_environment, metrics, run, train, without_speed

FIFTEEN = ("trainer.max_steps=15", "trainer.eval_every=5")
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
def three_stages(place):
    return train(place, *FIFTEEN, figures=True).json


def test_standard_output_is_the_summary(three_stages):
    assert three_stages.keys() == SUMMARY_KEYS
    assert three_stages["status"] == "done"
    assert [(s["first_step"], s["last_step"]) for s in three_stages["stages"]] == [(0, 1), (2, 6), (7, 14)]


def test_every_metric_is_written_for_every_step(three_stages):
    records = metrics(three_stages["run_dir"])
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
    facts = call("est-eval", f"run={three_stages['run_dir']}", "format=json", cwd=place).json
    assert facts["val_loss"] == three_stages["val_loss"]
    assert facts["step"] == 14
    assert facts["perplexity"] == pytest.approx(np.exp(facts["val_loss"]))


def test_equal_configs_give_equal_metrics(three_stages, place):
    """In another process, whose hash seed is another one, and by --rerun: each has a folder of its own."""
    command = [sys.executable, "-m", "est_cli", *ON_CORPUS, *FIFTEEN, "hydra.run.dir=again"]
    subprocess.run(command, cwd=place, env=clean_environment(place), check=True)
    repeated = run("est-train", "--rerun", three_stages["run_dir"], "format=json", cwd=place).json["run_dir"]
    first, *others = (without_speed(metrics(folder)) for folder in (three_stages["run_dir"], place / "again", repeated))
    assert repeated != three_stages["run_dir"] and others == [first] * 2


def test_est_plan_prints_the_indices_that_the_run_used(place):
    """The gradient that reached a row tells that it was sampled: with freeze, only sampled rows move."""
    common = ("trainer.max_steps=9", "optimizer.unsampled=freeze", "trainer.checkpoint_every=1", "checkpoint.keep=99")
    folder = Path(train(place, *common).json["run_dir"])
    before, after = (load_file(folder / "checkpoints" / f"step-{n:08d}" / "model.safetensors") for n in (4, 5))
    plan = call("est-plan", *ON_CORPUS, *common, "step=4", "format=json", cwd=place).json
    for position, layer in enumerate(plan["layers"]):
        name = f"blocks.{layer}.mlp.down.weight"
        moved = np.flatnonzero((before[name] != after[name]).any(axis=1))
        assert moved.tolist() == plan["neurons"][position]


@pytest.mark.parametrize(("override", "tolerance"), [("kernels=masked", 1e-4), ("trainer.precision=bf16", 0.02)])
def test_masked_execution_and_bf16_train_the_same_model(three_stages, place, override, tolerance):
    ours, theirs = (
        metrics(folder) for folder in (three_stages["run_dir"], train(place, *FIFTEEN, override).json["run_dir"])
    )
    assert [r["flops/step"] for r in ours] == [r["flops/step"] for r in theirs]
    np.testing.assert_allclose([r["train/loss"] for r in theirs], [r["train/loss"] for r in ours], rtol=tolerance)


def test_a_finished_run_is_refused(three_stages, place):
    done = call("est-train", *ON_CORPUS, *FIFTEEN, f"hydra.run.dir={three_stages['run_dir']}", cwd=place)
    assert (done.code, "finished" in done.err) == (2, True), done.err


@pytest.mark.slow
def test_a_short_run_on_the_standard_library_learns(tmp_path):
    """Below the unigram entropy: the loss of a model that knows each token's frequency and nothing else."""
    common = ("model=micro", "data.seq_len=64", "logger=none", "trainer.device=cpu")
    summary = run(
        "est-train", *common, "trainer.max_steps=400", "trainer.batch_size=16", "optimizer.lr=1e-2",
        "trainer.eval_tokens=4096", "trainer.eval_every=0", "trainer.checkpoint_every=0", "format=json", cwd=tmp_path,
    ).json  # fmt: skip
    prepared = call("est-data", *common, "format=json", cwd=tmp_path).json
    assert summary["val_loss"] < 0.95 * prepared["splits"]["val"]["unigram_entropy_nats"]
