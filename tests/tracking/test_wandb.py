import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from est_cli.tracking.loggers import WandbTracker
from est_cli.tracking.metrics import MetricsFile
from tracking.simulated import follow, record, run_info
from tracking.wandb_file import read_wandb_file, values

FAKE = Path(__file__).parent / "fake_wandb"
SUMMARY = {"status": "done", "steps": 4, "stages": [{"stage": 1, "flops": 12e12}]}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What the run called of wandb, by name."""
    path = tmp_path / "calls.jsonl"
    path.touch()
    monkeypatch.syspath_prepend(FAKE)
    monkeypatch.setenv("FAKE_WANDB_CALLS", str(path))
    return lambda name: [call for call in map(json.loads, path.read_text().splitlines()) if call["called"] == name]


def track(run, steps, status="done"):
    """Runs the two trackers over `steps`; returns the messages for people."""
    messages = []
    trackers = [MetricsFile(messages.append), WandbTracker(messages.append)]
    follow(trackers, run, map(record, steps), status, SUMMARY)
    return messages


def test_an_offline_run_that_was_resumed_is_one_run_of_the_real_wandb_with_every_step_once(tmp_path):
    """Stopped after step 3, its newest checkpoint of step 2: `wandb sync` finds one folder, which has it all."""
    pytest.importorskip("wandb")
    run = run_info(tmp_path, project="mine", group="sweep", tags=("a", "b"))
    assert track(run, range(4), status="stopped") == []
    [old] = (tmp_path / "wandb").glob("offline-run-*")
    time.sleep(1.1)  # within one second wandb numbers the second folder, behind the id
    assert track(dataclasses.replace(run, first_step=3), range(3, 6)) == []
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    run_id = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    assert folder.name.endswith(run_id) and old.name.endswith(run_id)
    records = list(read_wandb_file(folder / f"run-{run_id}.wandb"))
    of_kind = {
        kind: [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]
        for kind in ("run", "metric", "history", "summary", "exit")
    }
    [header] = of_kind["run"]
    assert (header.project, header.run_group, list(header.tags)) == ("mine", "sweep", ["a", "b"])
    assert header.notes == "est-train model=micro"
    assert [(m.name or m.glob_name, m.step_metric) for m in of_kind["metric"]] == [("step", ""), ("*", "step")]
    config = values(header.config.update)
    assert config["model"]["n_layers"] == run.config.model.n_layers
    assert config["scheduler"]["stages"]["1"] == vars(run.config.scheduler.stages[0])
    history = [values(entry.item) for entry in of_kind["history"]]
    assert [entry["_step"] for entry in history] == list(range(6))
    for entry, step in zip(history, range(6), strict=True):
        expected = {key: value for key, value in record(step).items() if value is not None}
        assert {key: entry[key] for key in entry if not key.startswith("_")} == expected
    final = {key: value for entry in of_kind["summary"] for key, value in values(entry.update).items()}
    assert (final["status"], final["stages"]["1"]["flops"]) == ("done", 12e12)
    assert [entry.exit_code for entry in of_kind["exit"]] == [0]


@pytest.mark.parametrize(("mode", "logged", "wandb_has"), [("offline", 8, 0), ("online", 8, 7), ("online", 6, 2)])
def test_a_resumed_run_sends_what_wandb_does_not_have_under_the_same_id(
    tmp_path, calls, monkeypatch, mode, logged, wandb_has
):
    """An offline run is replayed whole. Of an online run the kill kept the last lines from wandb, or from the disk."""
    track(run_info(tmp_path, mode=mode), range(logged), status="stopped")
    killed = tmp_path / "wandb" / f"offline-run-20200101_000000-{calls('init')[0]['id']}"
    killed.mkdir()
    monkeypatch.setenv("FAKE_WANDB_STARTING_STEP", str(wandb_has))
    track(run_info(tmp_path, first_step=5, mode=mode), range(5, 10))
    first, second = calls("init")
    assert first["id"] == second["id"]
    assert first.get("resume") == second.get("resume") == ("allow" if mode == "online" else None)
    assert [call["step"] for call in calls("log")] == [*range(logged), *range(wandb_has, 10)]
    assert not killed.exists()


@pytest.mark.parametrize(("status", "exit_code"), [("done", 0), ("stopped", 75), ("failed", 1)])
def test_wandb_is_told_how_the_run_ended(tmp_path, calls, status, exit_code):
    track(run_info(tmp_path), range(2), status)
    assert [call["exit_code"] for call in calls("finish")] == [exit_code]
    assert len(calls("mark_preempting")) == (status == "stopped")


def test_a_killed_training_is_a_crash_in_wandb_with_every_step(tmp_path, calls):
    if not (training := os.fork()):
        try:
            follow([MetricsFile(print), WandbTracker(print)], run_info(tmp_path), map(record, range(3)))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(training, 0)
    wait_for(lambda: calls("finish"))
    assert [call["step"] for call in calls("log")] == [0, 1, 2]
    assert [call["exit_code"] for call in calls("finish")] == [1]


def test_no_process_is_left_behind_by_a_killed_training_and_a_wandb_that_hangs(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("FAKE_WANDB", "hangs")
    tracker = WandbTracker(print, finish_timeout_s=0.5)
    follow([MetricsFile(print), tracker], run_info(tmp_path), [])
    tracker._process.stdin.close()
    assert tracker._process.wait(10) == 1


def wait_for(happened, seconds=10):
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("killed service", "W&B failed (Connection lost); training goes on"),
        ("dies", "W&B's process ended (exit code 7); training goes on"),
        ("slow network", "W&B has not taken everything in time"),
        ("hangs", "W&B did not finish within 1 s"),
    ],
)
def test_what_happens_to_wandb_is_said_once_and_does_not_reach_the_training(tmp_path, calls, monkeypatch, fault, said):
    monkeypatch.setenv("FAKE_WANDB", fault)
    messages = []
    tracker = WandbTracker(messages.append, finish_timeout_s=1.0 if fault == "hangs" else 30.0)
    follow([MetricsFile(messages.append), tracker], run_info(tmp_path), map(record, range(6)))
    if fault in ("killed service", "dies"):
        wait_for(lambda: messages)
    started = time.monotonic()
    tracker.finish("done", SUMMARY)
    assert time.monotonic() - started < 8
    assert len(messages) == 1 and said in messages[0]


def test_without_a_network_the_run_is_recorded_offline(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("FAKE_WANDB", "no network")
    [message] = track(run_info(tmp_path, mode="online"), range(3))
    assert "could not reach the server" in message and "wandb sync" in message and "and more" not in message
    assert [call["mode"] for call in calls("init")] == ["online", "offline"]
    assert len(calls("log")) == 3


def test_a_run_directory_that_wandb_cannot_use_does_not_stop_the_training(tmp_path, calls):
    (tmp_path / "wandb").write_text("not a folder")
    [message] = track(run_info(tmp_path), range(3))
    assert "W&B could not start" in message
