"""summary.json and the table that a run ends with."""

from collections.abc import Iterable, Mapping
from itertools import islice
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from est_cli.subnet.schedule import Stage
from est_cli.tracking.tracker import Record, RunInfo
from est_cli.units import format_clock, format_count, format_flops, format_loss, format_percent, format_step_time


def summarize(
    run: RunInfo,
    records: Iterable[Record],
    *,
    status: str,
    steps: int,
    train_s: float,
    peak_memory_bytes: int | None,
    skipped_steps: int = 0,
) -> dict[str, Any]:
    """summary.json of a run that took `steps` optimizer steps, including those before it was resumed.

    `records` are all of metrics.jsonl and are read once. FLOPs of steps that were not logged count too.
    """
    step_s: dict[int, list[float]] = {stage.number: [] for stage in run.stages}
    last: Record = {}
    val_loss = None
    for last in records:
        if last["perf/step_s"] is not None:
            step_s[last["stage"]].append(last["perf/step_s"])
        if last["val/loss"] is not None:
            val_loss = last["val/loss"]
    tokens_per_step = last["tokens"] // (last["step"] + 1) if last else 0
    stages = [
        _summarize_stage(run, stage, min(stage.end, steps), step_s[stage.number], tokens_per_step)
        for stage in run.stages
        if stage.first_step < steps
    ]
    return {
        "status": status,
        "steps": steps,
        "tokens": tokens_per_step * steps,
        "val_loss": val_loss,
        "flops_total": run.ledger.spent(steps).total,
        "flops_full_total": run.ledger.full.total * steps,
        "flops_saved": run.ledger.saved(steps) if steps else 0.0,
        "flops_saved_blocks": run.ledger.saved_blocks(steps) if steps else 0.0,
        "train_s": train_s,
        "peak_memory_bytes": peak_memory_bytes,
        "skipped_steps": skipped_steps,
        **{key: value for key, value in last.items() if key.startswith("grown/")},
        "stages": stages,
    }


def _summarize_stage(run: RunInfo, stage: Stage, end: int, step_s: list[float], tokens_per_step: int) -> dict[str, Any]:
    # The first step of a stage pays for compilation and allocation.
    typical = median(islice(step_s, 1 if len(step_s) > 3 else 0, None)) if step_s else None
    return {
        "stage": stage.number,
        "first_step": stage.first_step,
        "last_step": end - 1,
        "flops": run.ledger.per_step[stage.number - 1].total * (end - stage.first_step),
        "saved": run.ledger.stage_saved(stage.number),
        "step_s_median": typical,
        "tokens_per_s": tokens_per_step / typical if typical else None,
    }


def joined_part(record: Mapping[str, Any]) -> str:
    """` (50.0% of the layers)` if the loss is not the full model's: a run that grows logs grown/*. Else empty."""
    units = {"grown/heads": "heads", "grown/mlp": "neurons", "grown/layers": "layers"}
    parts = [f"{format_percent(record[key])} of the {what}" for key, what in units.items() if record.get(key, 1.0) < 1]
    return f" ({', '.join(parts)})" if parts else ""


def narrow_table(**options: Any) -> Table:
    """A rich table without edges and with one space between columns, for windows of 80 columns and fewer."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), **options)


def stage_table(summary: dict[str, Any]) -> Table:
    """What each stage did and what all of them saved. Readable from 40 columns on."""
    table = narrow_table(show_footer=True, caption=_totals(summary), caption_justify="left", caption_style="")
    # Narrow windows may wrap a cell, but not break its longest word.
    columns = (
        ("stage", "all", 5, lambda stage: str(stage["stage"])),
        ("steps", _steps(summary["steps"]), 5, lambda stage: _steps(stage["last_step"] - stage["first_step"] + 1)),
        ("FLOPs", format_flops(summary["flops_total"]), 5, lambda stage: format_flops(stage["flops"])),
        ("saved", format_percent(summary["flops_saved"]), 5, lambda stage: format_percent(stage["saved"])),
        ("time per step", "", 4, lambda stage: format_step_time(stage["step_s_median"])),
        ("tok/s", "", 5, lambda stage: format_count(stage["tokens_per_s"])),
    )
    for header, footer, longest_word, _ in columns:
        table.add_column(header, footer, justify="left" if header == "stage" else "right", min_width=longest_word)
    for stage in summary["stages"]:
        table.add_row(*(cell(stage) for *_, cell in columns))
    return table


def _steps(steps: int) -> str:
    return str(steps) if steps < 100_000 else format_count(steps)


def _totals(summary: dict[str, Any]) -> str:
    steps = "" if summary["status"] == "done" else f" ({summary['status']} after {summary['steps']} steps)"
    return (
        f"\nValidation loss{joined_part(summary) or ' of the full model'}: {format_loss(summary['val_loss'])}{steps}\n"
        f"FLOPs saved: {format_percent(summary['flops_saved'])} of the whole model, "
        f"{format_percent(summary['flops_saved_blocks'])} on its blocks (as the paper counts)\n"
        f"Trained for {format_clock(summary['train_s'])} on {format_count(summary['tokens'])} tokens"
    )
