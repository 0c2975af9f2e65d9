"""The HTML page: one file, no network, readable without its script. page.html is its Jinja2 template."""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
import yaml

from est_cli import units
from est_cli.reports import style
from est_cli.reports.comparison import Comparison
from est_cli.reports.coverage import Coverage
from est_cli.reports.curves import Axis, known_axes, run_with_shared_stages
from est_cli.reports.figures import Drawing
from est_cli.reports.records import RunRecord, evenly

_FOLDER = Path(__file__).parent
_MAX_HOVER_ROWS_IN_ALL, _MAX_HOVER_ROWS = 8000, 400
_MODEL_LINE = {
    "model.n_layers": "{} layers",
    "model.n_heads": "{} heads",
    "model.d_model": "width {}",
    "model.d_ff": "MLP {}",
    "model.vocab_size": "vocabulary {}",
    "data.kind": "data {}",
    "data.seq_len": "sequences of {}",
    "optimizer.lr": "learning rate {}",
    "seed": "seed {}",
}
"""The settings that a reader asks for first."""


def page(comparison: Comparison, drawings: Sequence[Drawing], coverage: Coverage | str) -> str:
    """The whole document. `coverage` is a text if it is not known: why."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    formats = ("count", "flops", "percent", "loss", "ratio", "step_time", "clock", "setting")
    environment.filters |= {name: getattr(units, f"format_{name}") for name in formats}
    environment.filters |= {"css_variable": style.css_variable, "thousands": "{:,}".format}
    losses = [drawing for drawing in drawings if drawing.hover == "loss"]
    runs = comparison.runs
    return environment.get_template("page.html").render(
        comparison=comparison,
        title=_title(comparison),
        model_line=_model_line(comparison),
        tiles=_tiles(comparison),
        drawings={drawing.name: drawing for drawing in drawings},
        inline_svg=style.inline_svg,
        losses=losses,
        grows=any((run.column("grown/layers") < 1).any() for run in runs),
        strips=any(len(run.stages) > 1 for run in runs)
        and any(run_with_shared_stages(runs, drawing.axis) is None for drawing in losses),
        coverage=coverage,
        config=yaml.safe_dump(runs[0].config, sort_keys=False) if comparison.single else "",
        no_loss=any(math.isnan(run.outcome["val_loss"]) for run in runs if run.n_rows),
        now=datetime.now().strftime("%Y-%m-%d %H:%M"),
        css=style.css_rules() + (_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(_FOLDER / "page.js").read_text(encoding="utf-8"),
        curves=_hover_json(comparison),
    )


def _title(comparison: Comparison) -> str:
    if comparison.single:
        return comparison.runs[0].name
    names = {str(run.setting("name")) for run in comparison.runs}
    parents = {run.folder.resolve().parent for run in comparison.runs}
    what = names.pop() if len(names) == 1 else parents.pop().name if len(parents) == 1 else "Comparison"
    return f"{what}: {len(comparison.runs)} runs"


def _model_line(comparison: Comparison) -> str:
    """The settings that all runs share; before them, in a comparison, how many runs are done."""
    parts = []
    if not comparison.single:
        statuses = [run.status for run in comparison.runs]
        parts.append(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)))
    for key, text in _MODEL_LINE.items():
        value = comparison.runs[0].setting(key)
        if value is not None and key not in comparison.differing:
            parts.append(text.format(units.format_setting(value)))
    return " · ".join(parts)


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Name, value and note of the key numbers at the top of the page: of one run, or of the best arm and of all."""
    best = comparison.arms[0]

    def total(name: str) -> float:
        values = [value for arm in comparison.arms for value in arm.values(name)]
        return math.fsum(values) if values else math.nan

    def between(name: str) -> str:
        values = [arm.mean(name) for arm in comparison.arms if math.isfinite(arm.mean(name))]
        low, high = (units.format_percent(pick(values, default=None)) for pick in (min, max))
        return low if low == high else f"{low.removesuffix('%')}–{high}"

    if comparison.single:
        first, notes = "Validation loss", _notes(comparison.runs[0])
    else:
        first, notes = "Best validation loss", [f"{best.letter}  {best.label}", *3 * ["all runs together"]]
    return [
        (first, units.format_loss(best.mean("val_loss")), notes[0]),
        ("FLOPs saved", between("flops_saved"), "whole model, LM head included"),
        ("FLOPs saved, blocks", between("flops_saved_blocks"), "only the blocks, as the paper counts"),
        ("Training compute", units.format_flops(total("flops_total")), notes[1]),
        ("Training time", units.format_clock(total("train_s")), notes[2]),
        ("Tokens", units.format_count(total("tokens")), notes[3]),
    ]


def _notes(run: RunRecord) -> list[str]:
    """On the loss, the compute, the time and the tokens of one run."""
    loss, step_s = run.outcome["val_loss"], run.column("perf/step_s")
    perplexity = f"{math.exp(loss):.4g}" if loss < 50 else units.UNKNOWN
    grows = any((run.column(f"grown/{unit}")[-1:] < 1).any() for unit in ("heads", "mlp", "layers"))
    return [
        f"perplexity {perplexity}, {'the part that has joined' if grows else 'full model'}",
        f"full model: {units.format_flops(run.outcome['flops_full_total'])}",
        f"median step {units.format_step_time(float(np.nanmedian(step_s)) if np.isfinite(step_s).any() else None)}",
        f"{int(run.outcome['steps']):,} optimizer steps",
    ]


def _hover_json(comparison: Comparison) -> str:
    """The numbers under the pointer for the page's script, safe inside a `<script>` element."""
    arms, axes = comparison.coloured_arms, known_axes(comparison.runs)
    rows = min(_MAX_HOVER_ROWS, max(40, _MAX_HOVER_ROWS_IN_ALL // sum(len(arm.runs) for arm in arms)))
    data = {
        "whole_steps": any(axis.key == "steps" and axis.scale == 1 for axis in axes),
        "single": comparison.single,
        "arms": [
            {
                "letter": arm.letter,
                "series": arm.rank,
                "runs": [_hover_columns(run, axes, rows) for run in arm.runs if run.n_rows],
            }
            for arm in arms
        ],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hover_columns(run: RunRecord, axes: Sequence[Axis], rows: int) -> dict[str, list[float | None]]:
    val = run.column("val/loss")
    last_known = np.maximum.accumulate(np.where(np.isfinite(val), np.arange(run.n_rows), 0))
    columns = {axis.key: axis.values(run) for axis in axes} | {
        "train": run.column("train/loss_smoothed"),
        "val": val[last_known],
        "stage": run.column("stage"),
        "saved": run.column("flops/saved"),
        "blocks": run.column("flops/saved_blocks"),
    }
    return {
        key: [float(f"{value:.6g}") if np.isfinite(value) else None for value in values[evenly(run.n_rows, rows)]]
        for key, values in columns.items()
    }
