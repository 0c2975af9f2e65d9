import pytest

from est_cli.tracking.pace import Pace
from tracking.simulated import STEP_S, record, run_info


@pytest.fixture
def run(tmp_path):
    return run_info(tmp_path)


def observe(pace, steps, between_steps_s=0.0):
    now = 0.0
    for step in steps:
        now += record(step)["perf/step_s"] + between_steps_s
        pace.observe(record(step), now)
    return now


def test_time_left_expects_later_stages_to_cost_what_their_flops_say(run):
    pace = Pace(run)
    now = observe(pace, range(4))
    # 3e12 FLOPs took 0.03 s: 10 steps of 0.05 s and 16 of 0.09 s are to come.
    assert pace.seconds_left(now) == pytest.approx(10 * 0.05 + 16 * 0.09)


def test_a_stage_that_was_measured_counts_as_measured(run):
    pace = Pace(run)
    for step in range(8):
        pace.observe({**record(step), "perf/step_s": 1.0}, now=float(step))
    assert pace.step_s(2) == 1.0
    assert pace.step_s(3) == pytest.approx(9 / 5)


def test_the_slow_first_step_of_a_stage_does_not_count(run):
    pace = Pace(run)
    pace.observe({**record(0), "perf/step_s": 30.0}, now=0.0)
    observe(pace, range(1, 4))
    assert pace.step_s(1) == STEP_S[0]


def test_time_that_goes_into_evaluations_is_expected_to_go_on(run):
    quick, slow = Pace(run), Pace(run)
    quick_left = quick.seconds_left(observe(quick, range(14)))
    assert slow.seconds_left(observe(slow, range(14), between_steps_s=0.1)) > 2 * quick_left


def test_time_left_runs_down_between_records_and_ends_at_zero(run):
    pace = Pace(run)
    now = observe(pace, range(10))
    assert pace.seconds_left(now + 0.5) == pytest.approx(pace.seconds_left(now) - 0.5)
    assert pace.seconds_left(now + 1e6) == 0.0


def test_nothing_is_guessed_from_one_step_and_nothing_is_left_after_the_last(run):
    pace = Pace(run)
    pace.observe(record(0), now=0.0)
    assert pace.seconds_left(0.0) is None
    now = observe(pace, range(1, 30))
    assert pace.seconds_left(now) == 0.0
