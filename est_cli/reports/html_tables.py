"""The page's tables: results, stages, and what differs between configs."""

import math
from collections.abc import Sequence
from html import escape

from est_cli.reports import palette
from est_cli.reports.arms import Arm, Comparison
from est_cli.reports.differences import Difference
from est_cli.reports.stage_times import StageTime, stage_times
from est_cli.units import (
    UNKNOWN,
    format_clock,
    format_count,
    format_flops,
    format_loss,
    format_percent,
    format_ratio,
    format_setting,
    format_step_time,
)


def results_table(comparison: Comparison) -> str:
    """One row an arm, best first: mean over seeds, and their sample standard deviation."""
    baseline = full_model_arm(comparison)
    head = [
        "",
        "Configuration",
        "Runs",
        "Validation loss",
        "Saved",
        "Saved, blocks",
        "FLOPs",
        "Training time",
        "Tokens",
        "Status",
    ]
    rows = []
    for arm in comparison.arms:
        statuses = sorted({run.status for run in arm.runs})
        rows.append(
            [
                chip(arm),
                escape(arm.label),
                str(len(arm.runs)),
                _with_spread(arm),
                format_percent(arm.mean("flops_saved")),
                format_percent(arm.mean("flops_saved_blocks")),
                format_flops(arm.mean("flops_total")),
                _time(arm, baseline),
                format_count(arm.mean("tokens")),
                escape(", ".join(statuses)),
            ]
        )
    return table(head, rows, numeric=range(2, 9))


def full_model_arm(comparison: Comparison) -> Arm | None:
    """The best arm that trains the full model all the time: what the others' time is set against."""
    return next((arm for arm in comparison.arms if abs(arm.mean("flops_saved")) < 1e-9), None)


def _with_spread(arm: Arm) -> str:
    spread = arm.spread("val_loss")
    text = format_loss(arm.mean("val_loss"))
    return f"{text} <small>± {spread:.4f}</small>" if math.isfinite(spread) else text


def _time(arm: Arm, baseline: Arm | None) -> str:
    text = format_clock(arm.mean("train_s"))
    if baseline is None or baseline is arm or not baseline.mean("train_s") > 0:
        return text
    return f"{text} <small>{format_ratio(arm.mean('train_s') / baseline.mean('train_s'))}</small>"


def stages_table(comparison: Comparison) -> str:
    """One row a stage; arm by arm where there are several."""
    head = [
        "Stage",
        "Steps",
        "Heads",
        "MLP",
        "Layers",
        "FLOPs of a step",
        "against full",
        "Median step",
        "against full",
    ]
    if not comparison.single:
        head = ["", *head]
    rows = [
        ([] if comparison.single else [chip(arm)]) + _stage_row(entry)
        for arm in comparison.arms
        for entry in stage_times(arm)
    ]
    return table(head, rows, numeric=range(0 if comparison.single else 1, len(head)))


def _stage_row(entry: StageTime) -> list[str]:
    stage = entry.stage
    rates = [
        f"{rate:.3g}" if math.isfinite(rate) else UNKNOWN
        for rate in (stage.kept.heads, stage.kept.mlp, stage.kept.layers)
    ]
    return [
        str(stage.number),
        f"{stage.first_step}–{stage.last_step}",
        *rates,
        format_flops(entry.flops),
        format_ratio(entry.flops_ratio),
        format_step_time(entry.median),
        format_ratio(entry.time_ratio),
    ]


def differences_table(comparison: Comparison) -> str:
    """One row a run, one column a config key whose values differ."""
    arm_of = {id(run): arm for arm in comparison.arms for run in arm.runs}
    order = sorted(range(len(comparison.runs)), key=lambda i: (arm_of[id(comparison.runs[i])].rank, i))
    head = ["", "Run", *map(_key_cell, comparison.differing.values()), "Validation loss"]
    rows = [
        [
            chip(arm_of[id(run)]),
            f'<span title="{escape(str(run.folder))}">{escape(run.name)}</span>',
            *(escape(format_setting(difference.values[i])) for difference in comparison.differing.values()),
            format_loss(run.outcome["val_loss"]),
        ]
        for i, run in ((i, comparison.runs[i]) for i in order)
    ]
    return table(head, rows, numeric=[len(head) - 1])


def _key_cell(difference: Difference) -> str:
    others = [key for key in difference.also if not key.startswith("scheduler.stages[")]
    also = f"<br><small>and {escape(', '.join(others))}</small>" if others else ""
    return escape(difference.key) + also


def chip(arm: Arm) -> str:
    """The arm's letter in its colour."""
    return f'<span class="chip" style="--c:{palette.css_variable(arm.rank)}">{arm.letter}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML already. `numeric` columns are set flush right."""

    def row(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}{' class=n' if i in numeric else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
            + "</tr>"
        )

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'
