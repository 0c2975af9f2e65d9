"""A run in the terminal: the live panel, plain lines in a pipe, the time that is left."""

import errno
import io
import math
import os

import pytest
from rich.console import Console

from est_cli.tracking import display as display_module
from est_cli.tracking.display import Display, Pace, Panel, console_for
from tracking import simulated
from tracking.simulated import record, run_info


@pytest.fixture(autouse=True)
def capable_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class LostTerminal(Terminal):
    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def shown(run, steps=range(30), evaluate_every=10, file=None) -> str:
    """What a display writes of a run into `file`, by default a pipe."""
    console = Console(file=file or io.StringIO(), width=80, force_terminal=file and True, color_system=None)
    follow(Display(console), run, steps, evaluate_every)
    return console.file.getvalue()


def follow(display, run, steps=range(30), evaluate_every=10):
    records = (record(step, val_loss=3.25 if (step + 1) % evaluate_every == 0 else None) for step in steps)
    simulated.follow([display], run, records)
    display.say("checkpoint written: [a]/" + "a-long-folder/" * 10)
    display.finish("done", None)


def rendered(run, width, records, encoding="utf-8") -> str:
    panel, file = Panel(run), io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    for each in records:
        panel.observe(each)
    Console(file=file, width=width).print(panel)
    file.seek(0)
    return file.read()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_panel_shows_its_numbers_in_any_window(tmp_path, width):
    text = rendered(run_info(tmp_path), width, [record(s, val_loss=3.25 if s == 9 else None) for s in range(20)])
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    numbers = ("20 of 30 (66.7%)", "3 of 3", "2.100", "3.2500 after 10 steps", "711 tokens/s, 90.0 ms/step")
    for part in (*numbers, "1.00e-03", "35.6% (64.0 TFLOP)", "40.0%", "0:00"):
        assert part in text


def test_the_bar_is_filled_up_to_the_step_and_the_curve_ends_there(tmp_path):
    records = [record(step) for step in range(15)]
    _, _, low_curve, bar, *_ = rendered(run_info(tmp_path), 60, records).splitlines()
    assert bar == "━" * 30 + "─" * 30
    assert (len(low_curve.rstrip()), low_curve[0], low_curve[29]) == (30, "█", "▁")
    for width in (20, 60):  # in a narrow window numbers are cut, without an ellipsis, which ASCII does not have
        assert "=" * (width // 2) + "-" * (width // 2) in rendered(run_info(tmp_path), width, records, "ascii")
    # Losses that are no numbers change nothing.
    records += [record(15, loss=math.nan), record(16, loss=math.inf), {**record(17), "train/loss": None}]
    assert rendered(run_info(tmp_path), 60, records).splitlines()[2] == low_curve


def test_a_live_display_leaves_messages_stages_and_evaluations_above_it(tmp_path):
    text = shown(run_info(tmp_path), file=Terminal())
    stages = ("stage 2 of 3, from step 4", "stage 3 of 3, from step 14: the full model")
    for part in ("checkpoint written: [a]/", *stages, "10/30  loss 3.1000  validation 3.2500", "30 of 30 (100.0%)"):
        assert part in text


def test_without_a_terminal_there_are_plain_lines_and_no_control_characters(tmp_path):
    text = shown(run_info(tmp_path))
    assert "\x1b" not in text and "\r" not in text
    assert text.count("stage 1 of 3") == text.count("stage 2 of 3") == text.count("stage 3 of 3") == 1
    assert text.count("validation 3.2500") == 3
    assert "30/30  100%  stage 3  loss 1.1000  711 tokens/s  saved 23.7%  left 0:00" in text
    assert "a-long-folder/" * 10 in text  # a path is not broken in a narrow window


def test_plain_lines_are_few_even_when_every_step_is_logged(tmp_path, monkeypatch):
    progress = [line for line in shown(run_info(tmp_path), evaluate_every=1000).splitlines() if "/30" in line]
    assert [line.split("/")[0].strip() for line in progress] == ["1", "30"]  # quicker than a line in 10 s
    clock = iter(range(10**6))
    monkeypatch.setattr(display_module.time, "monotonic", lambda: float(next(clock)))
    assert 4 <= len(shown(run_info(tmp_path), evaluate_every=1000).splitlines()) <= 16


@pytest.mark.parametrize(("first_step", "file"), [(20, None), (30, Terminal())])  # also one killed after its end
def test_a_resumed_run_says_where_it_goes_on(tmp_path, first_step, file):
    text = shown(run_info(tmp_path, first_step), range(first_step, 30), file=file)
    assert f"stage 3 of 3, continuing at step {first_step}" in text


@pytest.mark.parametrize("output", [closed_pipe, LostTerminal])
def test_a_reader_or_terminal_that_goes_away_ends_the_display_and_not_the_training(tmp_path, monkeypatch, output):
    with output() as file:
        monkeypatch.setattr("sys.stdout", file)
        follow(Display(console_for("text")), run_info(tmp_path))


def test_json_leaves_standard_output_alone(capsys):
    console_for("json").print("for people")
    console_for("text").print("for people, too")
    assert capsys.readouterr() == ("for people, too\n", "for people\n")


def paced(run, steps, between_steps_s=0.0, step_s=None) -> tuple[Pace, float]:
    """The pace after these steps, and the time then."""
    pace, now = Pace(run), 0.0
    for step in steps:
        logged = record(step) | ({"perf/step_s": step_s(step)} if step_s else {})
        now += logged["perf/step_s"] + between_steps_s
        pace.observe(logged, now)
    return pace, now


# 3e12 FLOPs take 0.03 s: 10 steps of 0.05 s and 16 of 0.09 s are expected after the first 4.
@pytest.mark.parametrize(("done", "left"), [(1, None), (4, 10 * 0.05 + 16 * 0.09), (30, 0.0)])
def test_time_left_expects_later_stages_to_cost_what_their_flops_say_and_runs_down(tmp_path, done, left):
    pace, now = paced(run_info(tmp_path), range(done))
    assert pace.seconds_left(now) == (left and pytest.approx(left))
    if left:
        assert pace.seconds_left(now + 0.5) == pytest.approx(left - 0.5)
        assert pace.seconds_left(now + 1e6) == 0.0


def test_a_stage_that_was_measured_counts_as_measured_without_its_slow_first_step(tmp_path):
    pace, _ = paced(run_info(tmp_path), range(8), step_s=lambda step: 30.0 if step in (0, 4) else 1.0)
    assert (pace.step_s(1), pace.step_s(2), pace.step_s(3)) == (1.0, 1.0, pytest.approx(9 / 5))


def test_time_that_goes_into_evaluations_is_expected_to_go_on(tmp_path):
    quick, slow = (paced(run_info(tmp_path), range(14), between) for between in (0.0, 0.1))
    assert slow[0].seconds_left(slow[1]) > 2 * quick[0].seconds_left(quick[1])
