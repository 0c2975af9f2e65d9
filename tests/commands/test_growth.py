"""Growing runs as people use them: planned, trained, evaluated, exported, reported, refused."""

import json
import shutil
from pathlib import Path

import pytest

from tests.commands.cli import ON_CORPUS, Finished, call, metrics, train

STACKING = ("scheduler=stacking", "scheduler.grow_at=20", "trainer.max_steps=30")
NEEDS_TRANSFORMERS = "transformers is not installed: pip install 'est-cli[export]'"


@pytest.fixture(scope="module")
def done(place) -> Finished:
    """From step 16 on, the checkpoints that are left are from before the growth."""
    return train(place, *STACKING, "trainer.eval_every=5", "trainer.checkpoint_every=16", "trainer.save_final=full")


@pytest.fixture(scope="module")
def grown(done) -> Path:
    return Path(done.json["run_dir"])


def test_half_of_the_layers_train_until_the_growth_and_that_is_told(done, grown):
    records, summary = metrics(grown), json.loads((grown / "summary.json").read_text())
    stages = [(r["stage"], r["grown/layers"], r["subnet/layers"]) for r in records]
    assert stages == [(1, 0.5, 0.5)] * 20 + [(2, 1, 1)] * 10
    assert records[0]["flops/step"] < records[-1]["flops/step"]
    assert summary["flops_saved_blocks"] == pytest.approx(20 / 30 * 0.5)
    assert [stage["first_step"] for stage in summary["stages"]] == [0, 20]
    assert "stage 1 of 2, from step 0: the first 2 of 4 layers" in done.err
    assert "grows from 2 to 4 layers (stack)" in done.err


def test_est_plan_counts_what_the_run_spends(place, grown):
    plan = call("est-plan", *ON_CORPUS, *STACKING, "format=json", cwd=place).json
    assert plan["stages"][0]["grown"] == {"n_layers": 2, "n_heads": 4, "d_ff": 24}
    spent = [record["flops/step"] for record in metrics(grown)]
    assert [stage["flops_per_step"] for stage in plan["stages"]] == [spent[0], spent[-1]]
    assert plan["saved"] == pytest.approx(json.loads((grown / "summary.json").read_text())["flops_saved"])
    assert "2 of 4" in call("est-plan", *ON_CORPUS, *STACKING, cwd=place, COLUMNS="100").out


def test_the_part_that_has_joined_is_evaluated_and_exported(place):
    """The last layers of this run have not joined when it ends."""
    pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    stages = "scheduler.stages=[{end: 4, n_layers: 1}, {n_layers: 2}]"
    shallow = Path(train(place, "scheduler=stacking", stages, "trainer.max_steps=10").json["run_dir"])
    assert call("est-eval", f"run={shallow}", "format=json", cwd=place).json["val_loss"] == pytest.approx(
        metrics(shallow)[-1]["val/loss"], abs=1e-5
    )
    found = call("est-export", f"run={shallow}", "to=hf", "out=shallow-hf", "format=json", cwd=place).json
    config = json.loads((Path(found["out"]) / "config.json").read_text())
    assert (config["num_hidden_layers"], found["max_logit_difference"] <= 1e-5) == (2, True)
    assert call("est-generate", f"run={shallow}", "prompt=line", cwd=place).code == 0


def test_a_subnetwork_of_a_step_before_the_growth_can_be_exported(place, grown):
    pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    found = call("est-export", f"run={grown}", "out=early", "plan_step=3", "format=json", cwd=place).json
    assert json.loads((Path(found["out"]) / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_step_whose_layers_have_not_joined_yet_cannot_be_exported(place, grown):
    shutil.copytree(grown, place / "early-run")
    shutil.rmtree(place / "early-run" / "checkpoints" / "step-00000030")
    done = call("est-export", "run=early-run", "out=late", "plan_step=22", cwd=place)
    assert done.code == 2
    assert "plan_step=22: the newest checkpoint, of 16 steps, is from before step 20, where the model grows" in done.err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("est-analyze", ("run=",)), ("est-report", ("out=report", "runs=")), ("est-report", ("format=terminal", "runs="))],
)
def test_a_growing_run_can_be_analysed_and_reported(place, grown, command, arguments):
    *options, runs = arguments
    done = call(command, f"{runs}{grown}", *options, cwd=place, COLUMNS="100")
    assert done.code == 0, done.err


@pytest.mark.parametrize(("name", "first"), [("raptr", 2), ("layer_drop", 3)])
def test_raptr_and_layer_drop_sample_layers_only(place, name, first):
    records = metrics(train(place, f"scheduler={name}", "trainer.max_steps=8").json["run_dir"])
    assert [record["subnet/layers"] for record in records[:2]] == [first / 4] * 2
    assert {(record["subnet/heads"], record["subnet/mlp"]) for record in records} == {(1, 1)}
    assert records[-1]["subnet/layers"] == 1
