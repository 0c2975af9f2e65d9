"""est-analyze from a run directory to tables, JSON and figures."""

import json
from pathlib import Path

import pytest
import torch
from tiny import FULL, THREE_STAGES, Recorder, train_config

from est_cli.commands.analyze import run as analyze
from est_cli.data.batches import validation_windows
from est_cli.errors import UserError, say
from est_cli.evaluation.analysis import transitions
from est_cli.evaluation.run import open_run, run_store
from est_cli.subnet.schedule import stage_at
from est_cli.tracking.metrics import to_line
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import World
from est_cli.training.loop import Training
from est_cli.training.validation import mean_loss
from evaluation.tiny_runs import byte_model, model_of, write_run

SMALL = {"seed": 0, "tokens": 64, "plans": 4, "window": 3, "checkpoints": "all", "hessian_tokens": 16, "iterations": 3,
         "norms": [0.05, 0.1], "draws": 3}  # fmt: skip


def trained(folder: Path, stages, **checkpoint) -> Path:
    """A run of 15 steps on bytes, with what est-analyze reads of one."""
    write_run(folder, model_of(byte_model("llama")), stages=stages, eval_every=4, save_final="full")
    run, recorder = open_run(folder, say), Recorder()
    training = Training(run.config, run_store(run, say), World(device=torch.device("cpu")), [recorder])
    training.run(Checkpoints(folder / "checkpoints", **checkpoint), stopping=lambda: False)
    (folder / "metrics.jsonl").write_bytes(b"".join(map(to_line, recorder.records)))
    return folder


@pytest.fixture(scope="module")
def est(tmp_path_factory) -> Path:
    """With checkpoints after 2 and 15 updates, and none at the second transition."""
    return trained(tmp_path_factory.mktemp("runs") / "est", THREE_STAGES, lasting=frozenset({2}))


def analysis(run: str | list[str], out: Path, **changes) -> dict:
    analyze({"run": run, "out": str(out), "format": "text", **SMALL, **changes})
    return json.loads((out / "analysis.json").read_text())


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("analysis")


@pytest.fixture(scope="module")
def found(est, out) -> dict:
    return analysis(str(est), out)


def test_every_checkpoint_has_the_loss_of_the_full_model_and_of_each_stages_subnetworks(found, est):
    assert [(entry["step"], entry["stage"]) for entry in found["checkpoints"]] == [(1, 1), (14, 3)]
    rates = [[s["rates"] for s in entry["subnetworks"]] for entry in found["checkpoints"]]
    half = {"heads": 0.5, "mlp": 0.5}
    assert rates == [[{**half, "layers": 0.5}, {**half, "layers": 1.0}]] * 2
    opened = open_run(est, print)
    windows = validation_windows(run_store(opened, say).val, 8, 64)
    assert found["checkpoints"][1]["full_loss"] == mean_loss(opened.model, windows, 2)
    assert found["tokens"] == windows[:, 1:].size
    assert all(len(set(s["losses"])) == 4 for entry in found["checkpoints"] for s in entry["subnetworks"])


def test_a_transition_has_what_was_logged_and_what_its_checkpoint_shows(found):
    first, second = found["transitions"]
    assert [(t["step"], t["from_stage"], t["to_stage"]) for t in (first, second)] == [(2, 1, 2), (7, 2, 3)]
    at = found["checkpoints"][0]
    means = [sum(s["losses"]) / 4 for s in at["subnetworks"]]
    assert [first["at_checkpoint"][key] for key in ("before", "after")] == pytest.approx(means)
    assert first["at_checkpoint"]["full_loss"] == at["full_loss"]
    assert second["at_checkpoint"] is None, "no checkpoint was kept there"
    assert [entry["updates"] for entry in second["val_loss"]] == [4, 8]
    assert second["train_loss"]["before"] > 0


def test_every_draw_of_noise_has_a_rise_of_its_own(found):
    assert [entry["relative_norm"] for entry in found["perturbation"]] == [0.05, 0.1]
    assert all(len(set(entry["rises"])) == 3 for entry in found["perturbation"])


def test_the_same_seed_measures_the_same_and_another_does_not(found, est, tmp_path, capsys):
    assert analysis(str(est), tmp_path / "again") == found
    printed = capsys.readouterr().out
    for words in ("1 → 2, step 2", "checkpoint.at_boundaries=true", "heads 0.5, mlp 0.5", "largest eigenvalue"):
        assert words in printed, "the tables say what is missing and how to have it"
    other = analysis(str(est), tmp_path / "other", seed=1)
    assert all(other[key] != found[key] for key in ("checkpoints", "sharpness", "perturbation"))


def test_json_and_figures_are_written_where_out_says(found, out):
    names = ["analysis.json", "sharpness.png", "spread.png", "transitions.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))


def test_full_training_stands_beside_with_the_same_subnetworks(est, tmp_path, capsys):
    full = trained(tmp_path / "full", FULL)
    changes = {"checkpoints": "newest", "format": "json"}
    runs = analysis([str(est), str(full)], tmp_path / "out", **changes)["runs"]
    assert json.loads(capsys.readouterr().out)["runs"] == runs
    assert [Path(run["name"]).name for run in runs] == ["est", "full"]
    assert runs[1]["transitions"] == []
    rates = [[s["rates"] for s in run["checkpoints"][0]["subnetworks"]] for run in runs]
    assert rates[0] == rates[1] != []


def test_what_cannot_be_written_is_said_before_anything_is_measured(est, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out=.*file/below: cannot be a folder, because .*file is a file"):
        analyze({"run": str(est), "out": str(tmp_path / "file" / "below"), "format": "text", **SMALL})


def test_bad_values_are_told_together():
    with pytest.raises(UserError) as error:
        analyze({"run": "r", "out": None, "format": "text", **SMALL, "plans": 0, "norms": [0.0], "checkpoints": "al"})
    assert [problem.split("=")[0] for problem in error.value.problems] == ["plans", "checkpoints", "norms[0]"]


STAGES = train_config().stages
"""Of 2, 5 and 8 steps."""


def record(step: int, loss: float | None, val: float | None = None) -> dict:
    return {"step": step, "stage": stage_at(STAGES, step).number, "train/loss": loss, "val/loss": val}


RECORDS = [record(step, 100.0 - step, val=50.0 - step if step % 4 == 3 else None) for step in range(15)]


@pytest.mark.parametrize(
    ("records", "window", "transition", "expected"),
    [
        pytest.param(RECORDS, 2, 1, (94.5, 92.5, 0.5**0.5), id="the nearest steps"),
        pytest.param(RECORDS[::3], 2, 1, (95.5, 89.5, 4.5**0.5), id="the window counts logged steps"),
        pytest.param(RECORDS, 100, 0, (99.5, 96.0, (0.5 / 2 + 2.5 / 5) ** 0.5), id="never of a third stage"),
        pytest.param(RECORDS[:4], 3, 1, None, id="a side that was not logged has no loss"),
    ],
)
def test_a_transitions_sides_are_steps_of_its_stages(records, window, transition, expected):
    found = transitions(STAGES, records, [], window)[transition]["train_loss"]
    assert found is None if expected is None else tuple(found.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("records", "expected"),
    [(RECORDS, [(4, 47.0), (8, 43.0)]), ([*RECORDS[:6], record(6, 1.0, val=9.0), *RECORDS[7:]], [(7, 9.0), (8, 43.0)]),
     (RECORDS[:4], None), ([], None)],
    ids=["the last before and the first within", "one at the boundary is before it", "not that far", "nothing logged"],
)  # fmt: skip
def test_the_full_models_loss_is_the_last_before_and_the_first_within(records, expected):
    first, second = (transition["val_loss"] for transition in transitions(STAGES, records, [], 3))
    assert first is None
    assert (second and [(entry["updates"], entry["loss"]) for entry in second]) == expected
