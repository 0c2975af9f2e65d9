"""The report over ssh: any width, with and without colours and Unicode."""

import io

import numpy as np
import pytest
from rich.console import Console

from est_cli.reports.curves import Curve
from est_cli.reports.terminal import loss_plot, terminal_report


def shown(runs, width, encoding="utf-8", **options):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    terminal_report(runs, Console(file=file, width=width, **options))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [24, 40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_no_line_is_wider_than_the_window(one, swept, width, encoding):
    for runs in ([one], swept):
        assert max(map(len, shown(runs, width, encoding).splitlines())) <= width


def test_one_run_shows_its_numbers_and_stages(one):
    text = shown([one], 100)
    for part in (f"{one.outcome['val_loss']:.4f}", "26.7% of the blocks", "0.50×"):
        assert part in text


def test_several_runs_are_ranked(swept):
    text = shown(swept, 100)
    losses = [float(word) for word in text.split() if word.count(".") == 1 and word.startswith("3.") and len(word) == 6]
    assert len(losses) == 4
    assert losses == sorted(losses)


def test_without_colours_curves_are_told_apart_by_letters(swept):
    assert "⠀" < max(shown(swept, 80, force_terminal=True, color_system="standard")) <= "⣿"
    plain = shown(swept, 80)
    assert not any("⠀" < c <= "⣿" for c in plain)
    plot = "".join(line for line in plain.splitlines() if "|" in line)
    assert set("ABCD") <= set(plot)  # though they are close


def test_a_run_without_a_step_says_so(new_run):
    assert "No step" in shown([new_run(steps=60, done=0, finished=False)], 60)


def test_the_plot_puts_high_values_above_low_ones():
    line = Curve(np.array([0.0, 10.0]), np.array([2.0, 1.0]))
    *rows, _, ends = loss_plot([("x", "blue", line)], 30, (1.0, 2.0), "steps", braille=False).plain.splitlines()
    assert [row.find("x") for row in rows] == sorted(row.find("x") for row in rows)
    assert rows[0].startswith(" 2.00|x") and rows[-1].startswith(" 1.00|") and rows[-1].endswith("x")
    assert ends.split() == ["0", "steps", "10"]
