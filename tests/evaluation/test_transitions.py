"""What the log tells of a stage transition: means on either side, never of another stage."""

import pytest
from tiny import train_config

from est_cli.evaluation.transitions import Validation, transitions

STAGES = train_config().stages
"""Of 2, 5 and 8 steps."""


def record(step: int, loss: float | None, val: float | None = None) -> dict:
    stage = next(stage.number for stage in STAGES if step < stage.end)
    return {"step": step, "stage": stage, "train/loss": loss, "val/loss": val}


RECORDS = [record(step, 100.0 - step, val=50.0 - step if step % 4 == 3 else None) for step in range(15)]


def test_there_is_one_for_every_stage_but_the_last():
    assert [(found.updates, found.stage) for found in transitions(STAGES, RECORDS, 3)] == [(2, 1), (7, 2)]
    assert transitions(STAGES[:1], RECORDS, 3) == []


def test_the_sides_are_the_nearest_steps():
    found = transitions(STAGES, RECORDS, 2)[1].train
    assert (found.before, found.after) == (100 - 5.5, 100 - 7.5)
    assert found.standard_error == pytest.approx((0.5 / 2 + 0.5 / 2) ** 0.5)


def test_the_window_counts_logged_steps():
    """Every third step was logged: still up to two of them on either side."""
    found = transitions(STAGES, RECORDS[::3], 2)[1].train
    assert (found.before, found.after) == (100 - 4.5, 100 - 10.5)


def test_a_side_never_reaches_into_a_third_stage():
    found = transitions(STAGES, RECORDS, 100)[0].train
    assert (found.before, found.after) == (100 - 0.5, 100 - 4)


def test_the_full_models_loss_is_the_last_before_and_the_first_within():
    found = transitions(STAGES, RECORDS, 3)
    assert found[0].val is None, "nothing was evaluated before step 2"
    assert found[1].val == (Validation(4, 47.0), Validation(8, 43.0))


def test_an_evaluation_at_the_boundary_is_before_it():
    records = [*RECORDS[:6], record(6, 1.0, val=9.0), *RECORDS[7:]]
    assert transitions(STAGES, records, 3)[1].val[0] == Validation(7, 9.0)


def test_a_run_that_is_not_that_far_has_nothing_to_tell():
    assert [found.train for found in transitions(STAGES, RECORDS[:4], 3)][1] is None
    assert [(found.train, found.val) for found in transitions(STAGES, [], 3)] == [(None, None)] * 2
