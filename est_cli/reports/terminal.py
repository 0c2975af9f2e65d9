"""The report for people over ssh: tables and a loss plot, in windows of any width."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from est_cli import units
from est_cli.reports.comparison import Arm, Comparison
from est_cli.reports.curves import Axis, Curve, final_loss_window
from est_cli.reports.records import RunRecord

_COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan", "default")
_IN_ASCII = str.maketrans("–×±…", "-x~~")
_WIDEST_PLOT, _PLOT_HEIGHT = 100, 14
_BRAILLE = 0x2800
# The bits of the eight dots of a braille character, [row, column].
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def terminal_report(runs: Sequence[RunRecord], console: Console) -> None:
    """Prints the key numbers, the loss and the stages of one run, or the ranking of several."""
    comparison = Comparison(runs)
    with console.capture() as captured:
        console.print()
        if comparison.single:
            _print_run(runs[0], console)
        else:
            _print_ranking(comparison, console)
        if any(run.n_rows for run in runs):
            _print_loss(comparison, console)
        else:
            console.print("No step has been logged yet.", style="dim")
        if comparison.single:
            _print_stages(comparison.arms[0], console)
        for problem in (problem for run in runs for problem in run.problems):
            console.print(Text(problem, "dim"))
    text = captured.get()
    if console.options.ascii_only:
        text = text.translate(_IN_ASCII).encode(console.encoding, "replace").decode(console.encoding)
    console.file.write(text)


def _print_run(run: RunRecord, console: Console) -> None:
    planned, outcome = run.setting("trainer.max_steps"), run.outcome
    steps = f"{run.steps_done:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    saved, saved_blocks = (units.format_percent(outcome[name]) for name in ("flops_saved", "flops_saved_blocks"))
    time, tokens = units.format_clock(outcome["train_s"]), units.format_count(outcome["tokens"])
    console.print(Text(run.name, "bold"))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in (
        ("status", f"{run.status}, step {steps}"),
        ("validation loss", units.format_loss(outcome["val_loss"])),
        ("FLOPs saved", f"{saved} of the whole model, {saved_blocks} of the blocks"),
        ("training", f"{time}, {tokens} tokens, {units.format_flops(outcome['flops_total'])}"),
    ):
        facts.add_row(Text(name, "dim"), Text(value))
    console.print(facts)


def _print_table(
    console: Console, rows: Sequence[Any], columns: Sequence[tuple[int, str, Callable[[Any], str | Text]]]
) -> None:
    """A column has the width of a window from which it is shown, a name, and its cell for a row."""
    columns = [column for column in columns if console.width >= column[0]]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for _, name, _ in columns:
        if name == "configuration":
            table.add_column(name, overflow="fold", min_width=8)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text.assemble(cell(row)) for _, _, cell in columns))
    console.print(table)


def _print_ranking(comparison: Comparison, console: Console) -> None:
    def loss(arm: Arm) -> str:
        spread = arm.spread("val_loss")
        shown = f" ±{spread:.4f}" if math.isfinite(spread) and console.width >= 48 else ""
        return units.format_loss(arm.mean("val_loss")) + shown

    columns = (
        (0, "", lambda arm: Text(arm.letter, _COLOURS[arm.rank] if arm.coloured else "dim")),
        (0, "configuration", lambda arm: arm.label),
        (0, "val loss", loss),
        (58, "saved", lambda arm: units.format_percent(arm.mean("flops_saved"))),
        (68, "blocks", lambda arm: units.format_percent(arm.mean("flops_saved_blocks"))),
        (82, "time", lambda arm: units.format_clock(arm.mean("train_s"))),
        (90, "runs", lambda arm: str(len(arm.runs))),
        (104, "status", lambda arm: arm.statuses),
    )
    _print_table(console, comparison.arms, columns)


def _print_loss(comparison: Comparison, console: Console) -> None:
    axis = Axis.of("steps", comparison.runs)
    if comparison.single:
        run = comparison.runs[0]
        curves = [
            ("t", "red", Curve.of(run, axis, "train/loss_smoothed")),
            ("v", "blue", Curve.of(run, axis, "val/loss")),
        ]
        legend = Text.assemble(("v validation, full model", "blue"), "   ", ("t training, subnetwork", "red"))
    else:
        curves = [
            (arm.letter, _COLOURS[arm.rank], Curve.of(arm.runs[0], axis, "val/loss"))
            for arm in reversed(comparison.coloured_arms)
        ]
        legend = Text("Validation loss, full model; letters as in the table", "dim")
    curves = [found for found in curves if len(found[2])]
    limits = final_loss_window([line for _, _, line in curves])
    if limits is None:
        return
    # Dots of several curves can be told apart only by their colour. Without colours, letters are used.
    braille = not console.options.ascii_only and (console.color_system is not None or len(curves) == 1)
    console.print(loss_plot(curves, min(console.width, _WIDEST_PLOT), limits, axis.label, braille))
    console.print(legend)
    console.print()


def loss_plot(
    curves: Sequence[tuple[str, str, Curve]], width: int, limits: tuple[float, float], x_title: str, braille: bool
) -> Text:
    """Curves as braille dots or letters, each with its letter and rich colour; later ones are drawn over earlier ones.

    `width` is in characters, `limits` are the lowest and the highest loss shown.
    Why not plotext: version 5 rounds points to characters before it joins them, so in letters close curves coincide
    that differ here; the C++ kernel of version 6 can abort the process.
    """
    low, high = limits
    gutter = max(len(f"{limit:.2f}") for limit in limits) + 1
    columns = max(8, width - gutter - 1)
    right = max(float(line.x[-1]) for *_, line in curves) or 1.0
    per_row, per_column = (4, 2) if braille else (1, 1)
    n_rows, n_columns = per_row * _PLOT_HEIGHT, per_column * columns
    cells = [[(" ", "")] * columns for _ in range(_PLOT_HEIGHT)]
    for letter, colour, line in curves:
        first, last = (round(x / right * (n_columns - 1)) for x in line.x[[0, -1]].tolist())
        x = np.arange(first, last + 1)
        y = np.interp(x / (n_columns - 1) * right, line.x, line.y)
        y = (high - y) / (high - low) * (n_rows - 1)
        shown = (y >= -0.5) & (y <= n_rows - 0.5)
        x, y = x[shown], y[shown].round().astype(int)
        dots = np.zeros((_PLOT_HEIGHT, columns), dtype=int)
        np.bitwise_or.at(dots, (y // per_row, x // per_column), _DOTS[y % per_row, x % per_column])
        for row, column in np.argwhere(dots):
            cells[row][column] = (chr(_BRAILLE | dots[row, column]) if braille else letter, colour)

    tick, side, corner, floor = "┤│└─" if braille else "||+-"
    text = Text(no_wrap=True, overflow="crop")
    for row, line_of_cells in enumerate(cells):
        value = high - (high - low) * row / (_PLOT_HEIGHT - 1)
        labelled = row in (0, _PLOT_HEIGHT // 2, _PLOT_HEIGHT - 1)
        text.append(f"{f'{value:.2f}' if labelled else '':>{gutter}}{tick if labelled else side}", "dim")
        text.append_tokens(line_of_cells)
        text.append("\n")
    end = f"{right:.4g}"
    room = columns - len(end) - 2
    middle = x_title if len(x_title) < room else ""
    indent = " " * gutter
    return text.append(f"{indent}{corner}{floor * columns}\n{indent} 0{middle:^{room}}{end}\n", "dim")


def _print_stages(arm: Arm, console: Console) -> None:
    if not arm.stage_times:
        return
    columns = (
        (0, "stage", lambda entry: str(entry.stage.number)),
        (46, "steps", lambda entry: f"{entry.stage.first_step}–{entry.stage.last_step}"),
        (64, "heads", lambda entry: f"{entry.stage.kept.heads:.3g}"),
        (64, "MLP", lambda entry: f"{entry.stage.kept.mlp:.3g}"),
        (64, "layers", lambda entry: f"{entry.stage.kept.layers:.3g}"),
        (0, "step", lambda entry: units.format_step_time(entry.median)),
        (0, "time", lambda entry: units.format_ratio(entry.time_ratio)),
        (0, "FLOPs", lambda entry: units.format_ratio(entry.flops_ratio)),
    )
    _print_table(console, arm.stage_times, columns)
    console.print("step: median time; time and FLOPs: against the full model's stage", style="dim")
