"""trainer.profile: which steps a trace holds, and that looking changes nothing."""

import json
from dataclasses import replace

import pytest
from tiny import FULL, LLAMA, train_config

from est_cli.config import as_plain, read_train_config
from est_cli.errors import UserError
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.profile import Profile
from tests.training.runs import CPU, start, told


def profiled(folder, steps=(0, 1), stop_after=None, resume=False, **trainer):
    """The records of a run of 15 steps in stages of 2, 5 and 8, and the phases of every stage's trace."""
    training, recorder = start(train_config(LLAMA, grad_accum=2, **trainer))
    checkpoints = Checkpoints(folder)
    if resume:
        training.restore(checkpoints.to_resume(15, recorder.say))
    profile = steps and Profile(folder / "profile", CPU.device, steps, recorder.say)
    training.run(checkpoints, lambda: training.step == stop_after, profile)
    traces = {path.name: json.loads(path.read_text()) for path in (folder / "profile").glob("*.json")}
    names = {
        name: [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
        for name, trace in traces.items()
    }
    return told(recorder), names


@pytest.mark.parametrize(("steps", "count"), [((1, 1), 1), ((0, 2), 2)], ids=str)
def test_every_stage_has_one_trace_of_its_steps_and_looking_changes_nothing(tmp_path, steps, count):
    records, names = profiled(tmp_path / "profiled", steps)
    assert records == profiled(tmp_path / "usual", None)[0]
    assert sorted(names) == [f"stage-{number}.trace.json" for number in (1, 2, 3)]
    for found in names.values():
        assert [found.count(name) for name in ("pack", "norm", "optimizer")] == [count] * 3
        assert [found.count(name) for name in ("forward", "backward")] == [2 * count] * 2


def test_a_run_that_stops_within_the_steps_keeps_what_it_has_and_continues_with_the_rest(tmp_path):
    """And a stage whose steps have passed has no trace."""
    _, names = profiled(tmp_path, (1, 2), stop_after=4)
    assert names["stage-2.trace.json"].count("pack") == 1, "of steps 3 and 4, step 3 was taken"
    assert "stage-3.trace.json" not in names
    (tmp_path / "profile" / "stage-1.trace.json").unlink()
    _, names = profiled(tmp_path, (1, 2), resume=True)
    assert {name: found.count("pack") for name, found in names.items()} == {
        "stage-2.trace.json": 1,
        "stage-3.trace.json": 2,
    }


def test_a_disk_that_takes_no_trace_does_not_end_the_run(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    records, names = profiled(tmp_path, (0, 1), stages=FULL)
    assert len(records) == 15 and names == {}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("10", "must be STEP:COUNT"),
        (603, "in YAML with quotes"),
        ("-1:2", "must be STEP:COUNT"),
        ("1:2:3", "must be STEP:COUNT"),
        ("1:0", "COUNT must be at least 1 and at most 100"),
        ("0:101", "COUNT must be at least 1 and at most 100"),
        ("1:2", "STEP + COUNT must be at most 2, the steps of stage 1"),
        (True, "must be"),
    ],
)
def test_what_no_stage_can_follow_is_refused(value, words):
    config = train_config(LLAMA)
    plain = as_plain(replace(config, trainer=replace(config.trainer, profile=value)))
    with pytest.raises(UserError) as refused:
        read_train_config(plain)
    [problem] = refused.value.problems
    assert problem.startswith(f"trainer.profile={str(value).lower()}: ") and words in problem
