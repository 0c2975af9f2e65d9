"""Which trackers a config asks for; logger=csv and logger=tensorboard copy metrics.jsonl, every step once."""

import csv
import importlib.util
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from est_cli.errors import UserError
from est_cli.tracking.loggers import CsvTracker, TensorBoardTracker, WandbTracker, trackers_for
from est_cli.tracking.metrics import MetricsFile, iterate_metrics
from tracking.simulated import follow, record, run_info


@pytest.mark.parametrize(
    ("logger", "second"),
    [
        ({"kind": "wandb"}, ["WandbTracker"]),
        ({"kind": "csv"}, ["CsvTracker"]),
        ({"kind": "none"}, []),
        ({"kind": "wandb", "mode": "disabled"}, []),
    ],
)
def test_the_record_comes_first_and_the_display_last(tmp_path, logger, second):
    trackers = trackers_for(run_info(tmp_path, **logger).config)
    assert [type(tracker).__name__ for tracker in trackers] == ["MetricsFile", *second, "Display"]


def track(kind, run_dir: Path, steps, first_step=0, ends=True) -> list[str]:
    """Runs the tracker behind metrics.jsonl; returns the messages for people."""
    messages: list[str] = []
    trackers = [MetricsFile(messages.append), kind(messages.append)]
    losses = {2: math.nan}
    records = (record(step, val_loss=3.5 if step % 4 == 3 else None, loss=losses.get(step)) for step in steps)
    follow(trackers, run_info(run_dir, first_step), records, *(["done", None] if ends else ()))
    return messages


def csv_rows(run_dir: Path) -> list[dict]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{key: float(text) if text else None for key, text in row.items()} for row in csv.DictReader(file)]


def tensorboard_rows(run_dir: Path) -> list[dict]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    files = map(str, sorted((run_dir / "tensorboard").iterdir()))
    events = [event for path in files for event in loader.LegacyEventFileLoader(path).Load()]
    return [{"step": e.step, **{v.tag: v.simple_value for v in e.summary.value}} for e in events if e.summary.value]


def test_a_csv_has_every_number_to_the_last_bit_as_soon_as_it_is_logged(tmp_path):
    assert track(CsvTracker, tmp_path, range(6), ends=False) == []
    rows = csv_rows(tmp_path)
    assert rows == list(iterate_metrics(tmp_path / "metrics.jsonl"))
    assert rows[2]["train/loss"] is None and list(rows[0]) == list(record(0))


def test_tensorboard_reads_every_number_as_a_32_bit_float(tmp_path):
    pytest.importorskip("tensorboard")
    assert track(TensorBoardTracker, tmp_path, range(6)) == []
    records = [{k: v for k, v in r.items() if v is not None} for r in iterate_metrics(tmp_path / "metrics.jsonl")]
    expected = [{k: v if k == "step" else float(np.float32(v)) for k, v in r.items()} for r in records]
    assert tensorboard_rows(tmp_path) == expected


@pytest.mark.parametrize(("kind", "rows"), [(CsvTracker, csv_rows), (TensorBoardTracker, tensorboard_rows)])
def test_a_run_that_was_killed_and_continues_has_every_step_once(tmp_path, kind, rows):
    """Killed after step 7, with the files as they are then; its newest checkpoint is of step 5."""
    if kind is TensorBoardTracker:
        pytest.importorskip("tensorboard")
    killed, continued = tmp_path / "killed", tmp_path / "continued"
    killed.mkdir()
    track(kind, killed, range(8), ends=False)
    shutil.copytree(killed, continued)
    track(kind, continued, range(5, 10), first_step=5)
    assert [row["step"] for row in rows(continued)] == list(range(10))


def test_a_record_that_cannot_be_written_is_told_once_and_does_not_stop_the_training(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    [message] = track(CsvTracker, tmp_path, range(3))
    assert "training goes on" in message
    assert len(list(iterate_metrics(tmp_path / "metrics.jsonl"))) == 3


FOLDER_OF_OLD_RUNS = importlib.util.spec_from_file_location("wandb", None, submodule_search_locations=["wandb"])


@pytest.mark.parametrize(
    ("kind", "found", "said"),
    [
        (TensorBoardTracker, None, r"pip install 'est-cli\[tensorboard\]'.*logger=csv"),
        (WandbTracker, None, r"pip install 'wandb'.*logger=none"),
        (WandbTracker, FOLDER_OF_OLD_RUNS, r"pip install 'wandb'.*logger=none"),
    ],
)
def test_a_missing_library_is_the_users_mistake(monkeypatch, kind, found, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match=said):
        kind(print)
