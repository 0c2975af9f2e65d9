"""Folders → runs, metrics.jsonl → columns: what is found and read, and what is left out."""

import json
from dataclasses import astuple

import numpy as np
import pytest

from est_cli.errors import UserError
from est_cli.reports.records import load_runs, read_metrics


def test_a_sweep_folder_holds_the_runs_below_it_each_once(swept):
    first = swept[0].folder
    assert [run.folder for run in load_runs([first.parent, first])] == [run.folder for run in swept]
    assert (len(swept), swept[0].name) == (8, "stage1_end-0.1_stage2_end-0.4_seed-0")


def test_all_paths_without_runs_are_refused_at_once(one, tmp_path):
    for name in ("checkpoints", "wandb"):  # these hold no runs
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    wrong = one.folder.parent / "20260101-abd"
    with pytest.raises(UserError) as error:
        load_runs([tmp_path, wrong])
    empty, missing = error.value.problems
    assert "no metrics.jsonl there or below" in empty
    assert missing.startswith(f"runs={wrong}:") and "did you mean '20260101-abc'?" in missing
    with pytest.raises(UserError, match="at least one"):
        load_runs([])


def test_the_metrics_tell_the_outcome_without_a_summary_and_the_stages_without_a_config(new_run):
    told = new_run(steps=60)
    (told.folder / "summary.json").unlink()
    (told.folder / "config.yaml").write_text("name: x\n")
    [logged] = load_runs([told.folder])
    assert (told.status, logged.status) == ("done", "unfinished")
    assert logged.outcome == pytest.approx(told.outcome)
    assert [astuple(stage) for stage in logged.stages] == [astuple(stage) for stage in told.stages]


def test_an_old_summary_gives_way_once_a_stopped_run_goes_on(new_run):
    folder = new_run(steps=60, done=40, eval_every=10).folder
    (folder / "summary.json").write_text(json.dumps({"status": "stopped", "steps": 20, "val_loss": 99.0, "tokens": 1}))
    (run,) = load_runs([folder])
    assert (run.status, run.outcome["steps"]) == ("unfinished", 40)
    assert run.outcome["val_loss"] < 99
    (folder / "error.txt").write_text("RuntimeError")
    assert load_runs([folder])[0].status == "failed"


def test_a_config_that_cannot_be_read_is_a_problem_and_not_the_end(new_run):
    folder = new_run(steps=60).folder
    (folder / "config.yaml").write_text("a: [")
    (run,) = load_runs([folder])
    assert "config.yaml cannot be read" in run.problems[0]
    assert run.steps_done == 60
    assert np.isnan(run.column("perf/mfu")).all()  # never logged


def read(tmp_path, rows, **options):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return read_metrics(path, **options)


def test_a_short_file_is_read_whole_but_for_a_line_that_is_half_written(tmp_path):
    rows = [{"step": i, "train/loss": 5.0 - i, "val/loss": 4.0 if i == 2 else None} for i in range(4)]
    columns, n_lines = read(tmp_path, [*rows, '{"step": 4, "train/lo'])
    assert n_lines == 4
    np.testing.assert_array_equal(columns["step"], [0, 1, 2, 3])
    np.testing.assert_array_equal(columns["train/loss"], [5, 4, 3, 2])
    np.testing.assert_array_equal(columns["val/loss"], [np.nan, np.nan, 4, np.nan])
    assert read(tmp_path, []) == ({}, 0)


def test_thinning_keeps_the_first_the_last_and_every_validation_loss(tmp_path):
    rows = [{"step": i, "train/loss": 1.0, "val/loss": float(i) if i % 97 == 5 else None} for i in range(5000)]
    columns, n_lines = read(tmp_path, rows, max_lines=100)
    assert n_lines == 5000
    assert len(columns["step"]) < 300
    assert (columns["step"][0], columns["step"][-1]) == (0, 4999)
    np.testing.assert_array_equal(columns["val/loss"][np.isfinite(columns["val/loss"])], range(5, 5000, 97))


@pytest.mark.parametrize(("max_lines", "error"), [(5000, 1e-6), (90, 31)])
def test_seconds_are_the_sum_of_all_step_times_thinned_or_not(tmp_path, max_lines, error):
    rows = [{"step": i, "stage": 1 + (i >= 300), "perf/step_s": 30.0 if i in (0, 301) else 0.5} for i in range(1000)]
    columns, _ = read(tmp_path, rows, max_lines=max_lines)
    assert columns["seconds"][-1] == pytest.approx(30.0 + 30.0 + 998 * 0.5, abs=error)
    # A line stands for the steps since the one before it.
    columns, _ = read(tmp_path, [{"step": step, "perf/step_s": 0.1} for step in (0, 9, 19, 29)])
    np.testing.assert_allclose(columns["seconds"], [0.1, 1.0, 2.0, 3.0])
