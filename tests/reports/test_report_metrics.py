"""metrics.jsonl → columns: what is read, what is left out, and how fast."""

import json
import time

import numpy as np
import pytest

from est_cli.reports.metrics import read_metrics


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_short_file_is_read_whole(tmp_path):
    rows = [{"step": i, "train/loss": 5.0 - i, "val/loss": 4.0 if i == 2 else None} for i in range(4)]
    columns, n_lines = read_metrics(write_lines(tmp_path / "m", rows))
    assert n_lines == 4
    np.testing.assert_array_equal(columns["train/loss"], [5, 4, 3, 2])
    np.testing.assert_array_equal(columns["val/loss"], [np.nan, np.nan, 4, np.nan])


def test_a_line_that_is_half_written_is_skipped(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"step": 0, "train/loss": 5}\n{"step": 1, "train/loss": 4}\n{"step": 2, "train/lo')
    columns, _ = read_metrics(path)
    np.testing.assert_array_equal(columns["step"], [0, 1])


def test_an_empty_file_has_no_columns(tmp_path):
    assert read_metrics(write_lines(tmp_path / "m", [])) == ({}, 0)


def test_steps_that_are_logged_again_count_once_and_the_later_line_holds(tmp_path):
    steps = [0, 1, 2, 3, 2, 3, 4]
    columns, _ = read_metrics(write_lines(tmp_path / "m", [{"step": s, "train/loss": i} for i, s in enumerate(steps)]))
    np.testing.assert_array_equal(columns["step"], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(columns["train/loss"], [0, 1, 4, 5, 6])


def test_thinning_keeps_the_first_the_last_and_every_validation_loss(tmp_path):
    rows = [{"step": i, "train/loss": 1.0, "val/loss": float(i) if i % 97 == 5 else None} for i in range(5000)]
    columns, n_lines = read_metrics(write_lines(tmp_path / "m", rows), max_lines=100)
    assert n_lines == 5000
    assert len(columns["step"]) < 300
    assert (columns["step"][0], columns["step"][-1]) == (0, 4999)
    np.testing.assert_array_equal(columns["val/loss"][np.isfinite(columns["val/loss"])], range(5, 5000, 97))


@pytest.mark.parametrize("max_lines", [5000, 90])
def test_seconds_are_the_sum_of_all_step_times_thinned_or_not(tmp_path, max_lines):
    rows = [{"step": i, "stage": 1 + (i >= 300), "perf/step_s": 30.0 if i in (0, 301) else 0.5} for i in range(1000)]
    columns, _ = read_metrics(write_lines(tmp_path / "m", rows), max_lines)
    exact = 30.0 + 30.0 + 998 * 0.5
    assert columns["seconds"][-1] == pytest.approx(exact, abs=1e-6 if max_lines == 5000 else 31)


def test_a_line_stands_for_the_steps_since_the_one_before_it(tmp_path):
    rows = [{"step": step, "perf/step_s": 0.1} for step in (0, 9, 19, 29)]
    columns, _ = read_metrics(write_lines(tmp_path / "m", rows))
    np.testing.assert_allclose(columns["seconds"], [0.1, 1.0, 2.0, 3.0])


def test_200_000_lines_are_read_at_the_pace_of_a_million_in_five_seconds(tmp_path):
    others = {f"key/{i}": 1.23456789 for i in range(15)}
    line = json.dumps({"step": 123456, "val/loss": None, "perf/step_s": 0.1, **others})
    with (tmp_path / "m").open("w") as file:
        file.writelines(line.replace("123456", str(i)) + "\n" for i in range(200_000))
    start = time.process_time()
    _, n_lines = read_metrics(tmp_path / "m")
    assert n_lines == 200_000
    assert time.process_time() - start < 1.0 + 0.5  # half a second for the 20 000 lines that are parsed
