"""Growing runs as people use them: planned, trained, stopped, killed, evaluated, exported, reported, refused."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.commands.cli import TINY, call, metrics, run, without_speed, write_corpus
from tests.kills import RUN, Kill
from tests.kills import run as run_killed

STACKING = ("scheduler=stacking", "scheduler.grow_at=20", "trainer.max_steps=30")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    write_corpus(folder / "corpus")
    return folder


def train(place: Path, *overrides: str, code: int = 0):
    done = run(
        "est-train", *TINY, "format=json", "data=text", "data.path=corpus", "trainer.save_final=full", *overrides,
        cwd=place,
    )  # fmt: skip
    assert done.code == code, done.err
    return done


@pytest.fixture(scope="module")
def grown(place) -> Path:
    return Path(train(place, *STACKING, "trainer.eval_every=5", "run_id=grown").json["run_dir"])


def test_half_of_the_layers_train_until_the_growth(grown):
    records, summary = metrics(grown), json.loads((grown / "summary.json").read_text())
    assert [(r["stage"], r["grown/layers"], r["subnet/layers"]) for r in records] == [(1, 0.5, 0.5)] * 20 + [
        (2, 1, 1)
    ] * 10
    assert records[0]["flops/step"] < records[-1]["flops/step"]
    assert summary["flops_saved_blocks"] == pytest.approx(20 / 30 * 0.5)
    assert [stage["first_step"] for stage in summary["stages"]] == [0, 20]


def test_est_plan_counts_what_the_run_spends(place, grown):
    plan = call("est-plan", *TINY, "data=text", "data.path=corpus", *STACKING, "format=json", cwd=place).json
    assert plan["stages"][0]["grown"] == {"n_layers": 2, "n_heads": 4, "d_ff": 24}
    spent = [record["flops/step"] for record in metrics(grown)]
    assert [stage["flops_per_step"] for stage in plan["stages"]] == [spent[0], spent[-1]]
    assert plan["saved"] == pytest.approx(json.loads((grown / "summary.json").read_text())["flops_saved"])
    table = call("est-plan", *TINY, "data=text", "data.path=corpus", *STACKING, cwd=place, COLUMNS="100").out
    assert "2 of 4" in table


@pytest.mark.slow
def test_a_run_killed_on_both_sides_of_a_growth_and_in_it_has_the_bits_of_one_that_was_not(place):
    options = (*RUN, "scheduler=stacking", "scheduler.grow_at=10", "scheduler.grow=interleave", "trainer.max_steps=16",
               "trainer.checkpoint_every=4", "trainer.eval_every=5")  # fmt: skip
    assert run_killed(place, [*options, "run_id=whole"]) == 0, (place / "output.txt").read_text()
    for kill in (Kill("in the optimizer", 9), Kill("on a stage boundary", 10), Kill("in the optimizer", 13)):
        assert run_killed(place, [*options, "run_id=killed"], kill) == -signal.SIGKILL, kill
    assert run_killed(place, [*options, "run_id=killed"]) == 0, (place / "output.txt").read_text()
    whole, killed = (place / "outputs" / "est" / name for name in ("whole", "killed"))
    assert without_speed(metrics(killed)) == without_speed(metrics(whole))
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [folder / "checkpoints" / "step-00000016" / name for folder in (whole, killed)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def shallow(place) -> Path:
    """A run whose last layers have not joined when it ends."""
    stages = "scheduler.stages=[{end: 4, n_layers: 1}, {n_layers: 2}]"
    return Path(train(place, "scheduler=stacking", stages, "trainer.max_steps=10", "run_id=shallow").json["run_dir"])


def test_the_part_that_has_joined_is_evaluated_and_exported(place, shallow):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'est-cli[export]'")
    assert call("est-eval", f"run={shallow}", "format=json", cwd=place).json["val_loss"] == pytest.approx(
        metrics(shallow)[-1]["val/loss"], abs=1e-5
    )
    found = call("est-export", f"run={shallow}", "to=hf", "out=shallow-hf", "format=json", cwd=place).json
    config = json.loads((Path(found["out"]) / "config.json").read_text())
    assert (config["num_hidden_layers"], found["max_logit_difference"] <= 1e-5) == (2, True)
    assert call("est-generate", f"run={shallow}", "prompt=line", cwd=place).code == 0


def test_a_subnetwork_of_a_step_before_the_growth_can_be_exported(place, grown):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'est-cli[export]'")
    found = call("est-export", f"run={grown}", "out=early", "plan_step=3", "format=json", cwd=place).json
    assert json.loads((Path(found["out"]) / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_step_whose_layers_have_not_joined_yet_cannot_be_exported(place):
    stopped = train(place, *STACKING, "trainer.max_steps=24", "run_id=stopped", "trainer.checkpoint_every=8",
                    "trainer.save_final=none", "checkpoint.keep=5")  # fmt: skip
    folder = Path(stopped.json["run_dir"])
    shutil.rmtree(folder / "checkpoints" / "step-00000024", ignore_errors=True)
    done = call("est-export", f"run={folder}", "out=late", "plan_step=22", cwd=place)
    assert done.code == 2
    assert "plan_step=22: the newest checkpoint, of 16 steps, is from before step 20, where the model grows" in done.err


def test_a_growing_run_can_be_analysed_and_reported(place, grown):
    found = call("est-analyze", f"run={grown}", "format=json", cwd=place)
    assert found.code == 0, found.err
    report = call("est-report", f"runs=[{grown}]", "out=report", "format=json", cwd=place)
    assert report.code == 0, report.err
    terminal = call("est-report", f"runs=[{grown}]", "format=terminal", cwd=place, COLUMNS="100")
    assert terminal.code == 0, terminal.err


def test_the_growth_is_told(place):
    done = run("est-train", *TINY, "data=text", "data.path=corpus", *STACKING, "scheduler.grow=interleave", cwd=place)
    assert "stage 1 of 2, from step 0: the first 2 of 4 layers" in done.err + done.out
    assert "grows from 2 to 4 layers (interleave)" in done.err + done.out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("scheduler=stacking", "scheduler.depths=5"), "scheduler.depths=5: must be in [0, 4], or a fraction"),
        (("scheduler=stacking", "scheduler.grow=stak"), "scheduler.grow=stak: must be one of stack, interleave"),
        (
            ("scheduler=stacking", "scheduler.grow_moments=keep"),
            "grow_moments=keep: must be one of copy, reset",
        ),
        (("scheduler=stacking", "scheduler.depths=0"), "scheduler.grow=stack: there is no layer to copy from 0"),
        (("scheduler=stacking", "scheduler.grow_at=2000"), "scheduler.grow_at=2000 is step 2000, but training ends"),
        (("scheduler=stacking", "scheduler.depths=[1,2]"), "scheduler.depths=[1, 2]: must be as many"),
        (("scheduler=stacking", "scheduler.stages=[{end: 5, n_layers: 3}, {n_layers: 2}]"), "a model only grows"),
        (
            ("scheduler=stacking", "scheduler.stages=[{end: 5, n_heads: 3}, {}]"),
            "n_heads=3: must be in [2, 4]",
        ),
        (("scheduler=raptr", "scheduler.n_stages=0"), "scheduler.n_stages=0: must be an integer of at least 1"),
        (("scheduler=layer_drop", "scheduler.p_max=1.5"), "scheduler.p_max=1.5: must be a number in (0, 1]"),
        (("sampling.rescale.layers=square",), "sampling.rescale.layers=square: must be one of none, sqrt, inverse"),
        (("sampling.rescale_layers=true", "sampling.rescale.layers=sqrt"), "sampling.rescale.layers=sqrt: "),
        (
            ("sampling.layer_strategy=increasing", "sampling.layers=0.25"),
            "increasing: keeps at least half",
        ),
        (("sampling.layer_strategy=end",), "did you mean 'ends'?"),
    ],
)
def test_bad_input_is_one_message(place, overrides, message):
    done = call("est-plan", *TINY, *overrides, cwd=place)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_raptr_and_layer_drop_train_layers_alone(place):
    for name, first in (("raptr", 2), ("layer_drop", 3)):
        folder = Path(train(place, f"scheduler={name}", "trainer.max_steps=8").json["run_dir"])
        records = metrics(folder)
        assert [record["subnet/layers"] for record in records[:2]] == [first / 4] * 2
        assert {(record["subnet/heads"], record["subnet/mlp"]) for record in records} == {(1, 1)}
        assert records[-1]["subnet/layers"] == 1
