"""A run that is killed or stopped at any moment, and the same command again: the bits of one that was never touched."""

import signal
from pathlib import Path

import pytest

from tests.commands.cli import assert_same_bits, call, metrics
from tests.kills import PLACES, RUN, Kill, start

STEPS = (
    "trainer.max_steps=30", "trainer.eval_every=4", "trainer.checkpoint_every=3", "trainer.eval_tokens=160",
)  # fmt: skip
"""Stage boundaries at 4 and 14; evaluations and checkpoints fall on other steps."""
EVERYWHERE = (
    Kill("in a gradient accumulation", 2), Kill("on a stage boundary", 4), Kill("in an evaluation", 7),
    Kill("in a checkpoint's file", 8), Kill("before a checkpoint's rename", 11), Kill("in the optimizer", 12),
    Kill("while an old checkpoint is removed", 14), Kill("in a line of metrics.jsonl", 17),
    Kill("in a line of metrics.jsonl", 17), Kill("after a checkpoint's rename", 20), Kill("before the summary", 30),
)  # fmt: skip
"""In this order, on one run: twice in a row at one place too, and before the first checkpoint."""
GROWING = (
    "scheduler=stacking", "scheduler.grow_at=10", "scheduler.grow=interleave", "trainer.max_steps=16",
    "trainer.checkpoint_every=4", "trainer.eval_every=5",
)  # fmt: skip
AROUND_THE_GROWTH = (Kill("in the optimizer", 9), Kill("on a stage boundary", 10), Kill("in the optimizer", 13))


def trained(place: Path, run_id: str, *overrides: str) -> Path:
    done = start(place, [*RUN, *STEPS, *overrides, f"run_id={run_id}"]).finished()
    assert done.code == 0, done.err
    return place / "outputs" / "est" / run_id


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The run that was never touched."""
    return trained(place, "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "kills"), [("killed", (), EVERYWHERE), ("grown", GROWING, AROUND_THE_GROWTH)]
)
def test_a_run_that_was_killed_has_the_bits_of_one_that_was_not(place, whole, name, overrides, kills):
    for kill in kills:
        done = start(place, [*RUN, *STEPS, *overrides, f"run_id={name}"], kill).finished()
        assert done.code == -signal.SIGKILL, (kill, done.err)
    killed = trained(place, name, *overrides)
    expected = trained(place, f"{name}-whole", *overrides) if overrides else whole
    assert_same_bits(killed, expected)
    assert [record["step"] for record in metrics(killed)] == list(range(len(metrics(expected))))
    assert len(list(max((killed / "checkpoints").iterdir()).glob("*.safetensors"))) == 2
    assert not list((killed / "checkpoints").glob(".*"))


def test_a_run_is_killed_at_every_place():
    assert {kill.place for kill in EVERYWHERE} == set(PLACES)


@pytest.mark.parametrize(
    ("number", "job"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGUSR1, {"SLURM_JOB_ID": "4711"}),  # Slurm sends it before it takes the machine
        (signal.SIGINT, {"TORCHELASTIC_RUN_ID": "elastic"}),
    ],
)
def test_a_run_that_was_stopped_continues_to_the_same_bits(place, whole, number, job):
    """With the same command: where a scheduler gives the job an id, that is the run's."""
    run_id, *named = job.values() or ("stopped", "run_id=stopped")
    command = [*RUN, *STEPS, *named]
    done = start(place, command, Kill("in a gradient accumulation", 12, number), **job).finished()
    assert done.code == 75, done.err
    assert done.json["status"] == "stopped" and done.json["steps"] == 13
    assert "continue with: " in done.err and all(word in done.err for word in named)
    refused = call("est-train", *command, "optimizer.lr=0.02", f"run_id={run_id}", cwd=place)
    assert (refused.code, "optimizer.lr: was 0.01, is 0.02" in refused.err) == (2, True), refused.err
    again = start(place, command, **job).finished()
    assert (again.code, again.json["status"]) == (0, "done"), again.err
    assert_same_bits(place / "outputs" / "est" / run_id, whole)
