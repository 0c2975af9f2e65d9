"""The key numbers at the top of the page."""

import math
from html import escape

import numpy as np

from est_cli.reports.arms import Comparison
from est_cli.reports.records import RunRecord
from est_cli.units import (
    UNKNOWN,
    format_clock,
    format_count,
    format_flops,
    format_loss,
    format_percent,
    format_step_time,
)


def tiles(comparison: Comparison) -> str:
    """One run: its outcome. Several: the best of them, and the totals."""
    content = _of_run(comparison.runs[0]) if comparison.single else _of_comparison(comparison)
    return (
        '<section class="tiles">'
        + "".join(
            f'<div class="tile"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
            f"<small>{escape(note)}</small></div>"
            for name, value, note in content
        )
        + "</section>"
    )


def _evaluated(run: RunRecord) -> str:
    parts = [run.column(f"grown/{unit}")[-1:] for unit in ("heads", "mlp", "layers")]
    return "the part that has joined" if any((part < 1).any() for part in parts) else "full model"


def _of_run(run: RunRecord) -> list[tuple[str, str, str]]:
    outcome = run.outcome
    loss = outcome["val_loss"]
    step_s = run.column("perf/step_s")
    median = format_step_time(float(np.nanmedian(step_s)) if np.isfinite(step_s).any() else None)
    return [
        ("Validation loss", format_loss(loss), f"perplexity {_perplexity(loss)}, {_evaluated(run)}"),
        ("FLOPs saved", format_percent(outcome["flops_saved"]), "whole model, LM head included"),
        ("FLOPs saved, blocks", format_percent(outcome["flops_saved_blocks"]), "blocks alone, as the paper counts"),
        (
            "Training compute",
            format_flops(outcome["flops_total"]),
            f"full model: {format_flops(outcome['flops_full_total'])}",
        ),
        ("Training time", format_clock(outcome["train_s"]), f"median step {median}"),
        ("Tokens", format_count(outcome["tokens"]), f"{int(outcome['steps']):,} optimizer steps"),
    ]


def _of_comparison(comparison: Comparison) -> list[tuple[str, str, str]]:
    best = comparison.arms[0]
    total = {
        name: math.fsum(value for run in comparison.runs if math.isfinite(value := run.outcome[name]))
        for name in ("train_s", "tokens", "flops_total")
    }
    note = f"{best.letter}  {best.label}"
    return [
        ("Best validation loss", format_loss(best.mean("val_loss")), note),
        ("FLOPs saved", _range(comparison, "flops_saved"), "whole model, LM head included"),
        ("FLOPs saved, blocks", _range(comparison, "flops_saved_blocks"), "blocks alone, as the paper counts"),
        ("Training time", format_clock(total["train_s"]), "all runs together"),
        ("Training compute", format_flops(total["flops_total"]), "all runs together"),
        ("Tokens", format_count(total["tokens"]), "all runs together"),
    ]


def _range(comparison: Comparison, name: str) -> str:
    values = [arm.mean(name) for arm in comparison.arms if math.isfinite(arm.mean(name))]
    if not values:
        return UNKNOWN
    low, high = format_percent(min(values)), format_percent(max(values))
    return low if low == high else f"{low.removesuffix('%')}–{high}"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 50 else UNKNOWN
