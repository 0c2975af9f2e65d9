"""The report for people over ssh: tables and a text plot, in windows of any width."""

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from est_cli.reports.arms import Arm, Comparison
from est_cli.reports.axes import AXES
from est_cli.reports.curves import Curve, curve, final_loss_window, train_curve
from est_cli.reports.records import RunRecord
from est_cli.reports.stage_times import stage_times
from est_cli.reports.text_plot import TextCurve, text_plot
from est_cli.units import (
    format_clock,
    format_count,
    format_flops,
    format_loss,
    format_percent,
    format_ratio,
    format_step_time,
)

_COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan", "default")
_IN_ASCII = str.maketrans({"–": "-", "×": "x", "±": "~", "…": "~"})
_WIDEST_PLOT, _PLOT_HEIGHT = 100, 14


def terminal_report(runs: Sequence[RunRecord], console: Console) -> None:
    """Prints the key numbers, the loss and the stages of one run, or the ranking of several."""
    if _encodes(console, "⣿│┤└─–×±…"):
        _print_report(runs, console, unicode=True)
        return
    with console.capture() as captured:
        _print_report(runs, console, unicode=False)
    text = captured.get().translate(_IN_ASCII)
    console.file.write(text.encode(console.encoding, "replace").decode(console.encoding))


def _print_report(runs: Sequence[RunRecord], console: Console, unicode: bool) -> None:
    comparison = Comparison.of(runs)
    console.print()
    if comparison.single:
        _print_run(comparison.runs[0], console)
    else:
        _print_ranking(comparison, console)
    if any(run.n_rows for run in runs):
        _print_loss(comparison, console, unicode)
    else:
        console.print("No step has been logged yet.", style="dim")
    if comparison.single:
        _print_stages(comparison.arms[0], console)
    for run in runs:
        for problem in run.problems:
            console.print(Text(problem, "dim"))


def _print_run(run: RunRecord, console: Console) -> None:
    planned = run.setting("trainer.max_steps")
    steps = f"{run.steps_done:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    outcome = run.outcome
    console.print(Text(run.name, "bold"))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in (
        ("status", f"{run.status}, step {steps}"),
        ("validation loss", format_loss(outcome["val_loss"])),
        (
            "FLOPs saved",
            f"{format_percent(outcome['flops_saved'])} of the whole model, "
            f"{format_percent(outcome['flops_saved_blocks'])} of the blocks",
        ),
        (
            "training",
            f"{format_clock(outcome['train_s'])}, {format_count(outcome['tokens'])} tokens, "
            f"{format_flops(outcome['flops_total'])}",
        ),
    ):
        facts.add_row(Text(name, "dim"), Text(value))
    console.print(facts)


def _print_ranking(comparison: Comparison, console: Console) -> None:
    """As many columns as the window has room for; the label and the loss always."""
    loss = _with_spread if console.width >= 48 else lambda arm: format_loss(arm.mean("val_loss"))
    columns = [
        ("val loss", loss, 0),
        ("saved", _percent("flops_saved"), 58),
        ("blocks", _percent("flops_saved_blocks"), 68),
        ("time", _duration, 82),
        ("runs", lambda arm: str(len(arm.runs)), 90),
        ("status", lambda arm: ", ".join(sorted({run.status for run in arm.runs})), 104),
    ]
    columns = [column for column in columns if console.width >= column[2]]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("")
    table.add_column("configuration", overflow="fold", min_width=8)
    for name, _, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for arm in comparison.arms:
        table.add_row(Text(arm.letter, _colour(arm)), Text(arm.label), *(Text(show(arm)) for _, show, _ in columns))
    console.print(table)


def _with_spread(arm: Arm) -> str:
    spread = arm.spread("val_loss")
    return format_loss(arm.mean("val_loss")) + (f" ±{spread:.4f}" if math.isfinite(spread) else "")


def _percent(name: str):
    return lambda arm: format_percent(arm.mean(name))


def _duration(arm: Arm) -> str:
    return format_clock(arm.mean("train_s"))


def _colour(arm: Arm) -> str:
    return _COLOURS[arm.rank] if arm.coloured else "dim"


def _print_loss(comparison: Comparison, console: Console, unicode: bool) -> None:
    axis = AXES[0]
    scale, title = axis.unit(comparison.runs)
    curves = []
    if comparison.single:
        run = comparison.runs[0]
        curves = [TextCurve("t", "red", train_curve(run, axis)), TextCurve("v", "blue", curve(run, axis, "val/loss"))]
        legend = Text.assemble(("v validation, full model", "blue"), "   ", ("t training, subnetwork", "red"))
    else:
        curves = [
            TextCurve(arm.letter, _colour(arm), curve(arm.runs[0], axis, "val/loss"))
            for arm in reversed(comparison.arms)
            if arm.coloured
        ]
        legend = Text("Validation loss, full model; letters as in the table", "dim")
    curves = [TextCurve(c.letter, c.colour, Curve(c.curve.x / scale, c.curve.y)) for c in curves if len(c.curve)]
    limits = final_loss_window([c.curve for c in curves])
    if limits is None:
        return
    # Without colours, dots of several curves cannot be told apart: letters can.
    braille = unicode and (console.color_system is not None or len(curves) == 1)
    width = min(console.width, _WIDEST_PLOT)
    console.print(text_plot(curves, width, _PLOT_HEIGHT, limits, title, braille))
    console.print(legend)
    console.print()


def _encodes(console: Console, characters: str) -> bool:
    try:
        characters.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _print_stages(arm: Arm, console: Console) -> None:
    times = stage_times(arm)
    if not times:
        return
    wide, narrow = console.width >= 64, console.width < 46
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    names = ["stage", *(() if narrow else ("steps",)), *(("heads", "MLP", "layers") if wide else ()), "step", "time"]
    for name in [*names, "FLOPs"]:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in times:
        rates = entry.stage.kept
        kept = [f"{rate:.3g}" for rate in (rates.heads, rates.mlp, rates.layers)] if wide else []
        steps = [] if narrow else [f"{entry.stage.first_step}–{entry.stage.last_step}"]
        table.add_row(
            str(entry.stage.number),
            *steps,
            *kept,
            format_step_time(entry.median),
            format_ratio(entry.time_ratio),
            format_ratio(entry.flops_ratio),
        )
    console.print(table)
    console.print("step: median time; time and FLOPs: against the full model's stage", style="dim")
