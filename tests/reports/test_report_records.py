"""Folders → runs: where runs are found, what they are called, and what stands in for a missing summary."""

import json
from dataclasses import astuple

import numpy as np
import pytest

from est_cli.errors import UserError
from est_cli.reports import load_runs


def test_a_sweep_folder_holds_the_runs_below_it(sweep):
    runs = load_runs([sweep])
    assert len(runs) == 8
    assert runs[0].name == "stage1_end-0.1_stage2_end-0.4_seed-0"


def test_a_run_that_is_named_twice_is_loaded_once(sweep):
    assert len(load_runs([sweep, sweep / "stage1_end-0.1_stage2_end-0.4_seed-0"])) == 8


def test_checkpoints_and_wandb_folders_hold_no_runs(one_run, tmp_path):
    for name in ("checkpoints", "wandb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no metrics\.jsonl there or below"):
        load_runs([tmp_path])


def test_a_folder_that_is_not_there_names_the_key_and_the_nearest_one(one_run):
    wrong = one_run.parent / "20260101-abd"
    with pytest.raises(UserError) as error:
        load_runs([wrong])
    assert f"runs={wrong}" in str(error.value)
    assert "did you mean '20260101-abc'?" in str(error.value)


def test_every_wrong_path_is_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_runs([tmp_path / "a", tmp_path / "b"])
    assert len(error.value.problems) == 2


def test_no_path_at_all_is_refused():
    with pytest.raises(UserError, match="at least one"):
        load_runs([])


def test_without_a_summary_the_last_line_tells_the_outcome(new_run, tmp_path):
    done, going = (new_run(tmp_path / name, steps=60, finished=name == "done") for name in ("done", "going"))
    finished, unfinished = load_runs([done, going])
    assert (finished.status, unfinished.status) == ("done", "unfinished")
    for name, value in finished.outcome.items():
        assert unfinished.outcome[name] == pytest.approx(value), name


def test_an_old_summary_gives_way_once_a_stopped_run_goes_on(new_run, tmp_path):
    folder = new_run(tmp_path / "run", steps=60, done=40, eval_every=10)
    (folder / "summary.json").write_text(json.dumps({"status": "stopped", "steps": 20, "val_loss": 99.0, "tokens": 1}))
    (run,) = load_runs([folder])
    assert run.status == "unfinished"
    assert run.outcome["steps"] == 40
    assert run.outcome["val_loss"] < 99


def test_a_failed_run_is_called_failed(new_run, tmp_path):
    folder = new_run(tmp_path / "run", steps=60, done=30, finished=False)
    (folder / "error.txt").write_text("RuntimeError")
    assert load_runs([folder])[0].status == "failed"


def test_stages_come_from_the_metrics_where_the_config_does_not_tell(new_run, tmp_path):
    with_config, without = new_run(tmp_path / "a", steps=60), new_run(tmp_path / "b", steps=60)
    (without / "config.yaml").write_text("name: x\n")
    told, logged = load_runs([with_config, without])
    assert [astuple(stage) for stage in told.stages] == [astuple(stage) for stage in logged.stages]


def test_a_config_that_cannot_be_read_is_a_problem_and_not_the_end(new_run, tmp_path):
    folder = new_run(tmp_path / "run", steps=60)
    (folder / "config.yaml").write_text("a: [")
    (run,) = load_runs([folder])
    assert "config.yaml cannot be read" in run.problems[0]
    assert run.steps_done == 60


def test_a_column_that_was_never_logged_is_all_missing(one_run):
    (run,) = load_runs([one_run])
    assert np.isnan(run.column("perf/mfu")).all()
