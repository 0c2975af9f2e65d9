import errno
import io
import math
import os

import pytest
from rich.console import Console

from est_cli.tracking import display as display_module
from est_cli.tracking.display import Display, console_for
from est_cli.tracking.panel import Panel
from tracking.simulated import record, run_info


def run_to_the_end(display, run, steps=range(30), evaluate_every=10):
    display.start(run)
    for step in steps:
        display.log(record(step, val_loss=3.25 if (step + 1) % evaluate_every == 0 else None))
    display.finish("done", None)


def rendered(run, width, records, **console):
    panel = Panel(run)
    for each in records:
        panel.observe(each)
    console = Console(file=io.StringIO(), width=width, **console)
    console.print(panel)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_panel_shows_its_numbers_in_any_window(tmp_path, width):
    text = rendered(run_info(tmp_path), width, [record(s, val_loss=3.25 if s == 9 else None) for s in range(20)])
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for part in (
        "20 of 30 (66.7%)",
        "3 of 3",
        "2.100",
        "3.2500 after 10 steps",
        "711 tokens/s, 90.0 ms/step",
        "1.00e-03",
        "35.6% (64.0 TFLOP)",
        "40.0%",
        "0:00",
    ):
        assert part in text


def test_the_bar_is_filled_up_to_the_step_and_the_curve_ends_there(tmp_path):
    lines = rendered(run_info(tmp_path), 60, [record(step) for step in range(15)]).splitlines()
    low_curve, bar = lines[2], lines[3]
    assert bar == "━" * 30 + "─" * 30
    assert len(low_curve.rstrip()) == 30
    assert low_curve[0] == "█" and low_curve[29] == "▁"


def test_a_terminal_without_unicode_gets_ascii(tmp_path):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    panel = Panel(run_info(tmp_path))
    panel.observe(record(14))
    Console(file=output, width=60, color_system=None).print(panel)
    output.flush()
    assert b"=" * 30 + b"-" * 30 in output.buffer.getvalue()


def test_the_panel_survives_a_loss_that_is_not_finite(tmp_path):
    records = [record(0), record(1, loss=math.nan), record(2, loss=math.inf), {**record(3), "train/loss": None}]
    assert "loss" in rendered(run_info(tmp_path), 80, records)


def test_a_live_display_leaves_messages_stages_and_evaluations_above_it(tmp_path):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    display = Display(console, live=True)
    display.start(run_info(tmp_path))
    display.say("checkpoint written: [a]/path")
    for step in range(30):
        display.log(record(step, val_loss=3.25 if step == 9 else None))
    display.finish("done", None)
    text = console.file.getvalue()
    for part in (
        "checkpoint written: [a]/path",
        "stage 2 of 3, from step 4",
        "stage 3 of 3, from step 14: the full model",
        "10/30  loss 3.1000  validation 3.2500",
        "30 of 30 (100.0%)",
    ):
        assert part in text


def test_without_a_terminal_there_are_plain_lines_and_no_control_characters(tmp_path):
    console = Console(file=io.StringIO())
    run_to_the_end(Display(console), run_info(tmp_path))
    text = console.file.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert text.count("stage 1 of 3") == text.count("stage 2 of 3") == text.count("stage 3 of 3") == 1
    assert text.count("validation 3.2500") == 3
    assert "30/30  100%  stage 3  loss 1.1000  711 tokens/s  saved 23.7%  left 0:00" in text


def test_plain_lines_are_few_even_when_every_step_is_logged(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(display_module.time, "monotonic", lambda: float(next(clock)))
    console = Console(file=io.StringIO())
    display = Display(console)
    run = run_info(tmp_path)
    run_to_the_end(display, run, evaluate_every=1000)
    assert 4 <= len(console.file.getvalue().splitlines()) <= 15


def test_a_quick_run_prints_its_first_and_last_step_only(tmp_path):
    console = Console(file=io.StringIO())
    run_to_the_end(Display(console), run_info(tmp_path), evaluate_every=1000)
    progress = [line for line in console.file.getvalue().splitlines() if "/30" in line]
    assert [line.split("/")[0].strip() for line in progress] == ["1", "30"]


def test_a_path_is_not_torn_apart_in_a_narrow_window(tmp_path):
    console = Console(file=io.StringIO(), width=40)
    Display(console).say("checkpoint written: " + "a-long-folder/" * 10)
    assert "a-long-folder/" * 10 in console.file.getvalue()


def test_a_resumed_run_says_where_it_goes_on(tmp_path):
    console = Console(file=io.StringIO())
    run_to_the_end(Display(console), run_info(tmp_path, first_step=20), range(20, 30))
    assert "stage 3 of 3, continuing at step 20" in console.file.getvalue()


def test_a_run_that_was_killed_after_its_last_step_can_be_shown(tmp_path):
    run_to_the_end(Display(Console(file=io.StringIO(), force_terminal=True), live=True), run_info(tmp_path, 30), [])


@pytest.mark.parametrize("live", [False, True])
def test_a_reader_that_goes_away_ends_the_display_and_not_the_training(tmp_path, monkeypatch, live):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        run_to_the_end(Display(console_for("text"), live=live), run_info(tmp_path))


class LostTerminal(io.StringIO):
    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("live", [False, True])
def test_a_terminal_that_is_lost_ends_the_display_and_not_the_training(tmp_path, monkeypatch, live):
    monkeypatch.setattr("sys.stdout", LostTerminal())
    run_to_the_end(Display(console_for("text"), live=live), run_info(tmp_path))


def test_json_leaves_standard_output_alone(capsys):
    console_for("json").print("for people")
    console_for("text").print("for people, too")
    assert capsys.readouterr() == ("for people, too\n", "for people\n")
