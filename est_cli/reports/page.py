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
from est_cli.reports.comparison import Comparison, stage_times
from est_cli.reports.coverage import Coverage
from est_cli.reports.curves import AXES, STEPS, known_axes, run_with_shared_stages, train_curve
from est_cli.reports.figures import Drawing
from est_cli.reports.records import RunRecord

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


def page(comparison: Comparison, drawings: Sequence[Drawing], found: Coverage | str) -> str:
    """The whole document. `found` is the coverage, or why there is none."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    formats = ("count", "flops", "percent", "loss", "ratio", "step_time", "clock", "setting")
    environment.filters |= {name: getattr(units, f"format_{name}") for name in formats}
    environment.filters |= {"css_variable": style.css_variable, "rate": _rate, "thousands": "{:,}".format}
    losses = [drawing for drawing in drawings if drawing.hover == "loss"]
    runs = comparison.runs
    return environment.get_template("page.html").render(
        comparison=comparison,
        title=_title(comparison),
        model_line=_model_line(comparison),
        tiles=_run_tiles(runs[0]) if comparison.single else _comparison_tiles(comparison),
        figures={drawing.name: _figure(comparison, drawing) for drawing in drawings},
        losses=losses,
        grows=any((run.column("grown/layers") < 1).any() for run in runs),
        strips=any(len(run.stages) > 1 for run in runs)
        and any(run_with_shared_stages(comparison, drawing.axis) is None for drawing in losses),
        stage_times=stage_times,
        found=found,
        by_arm=sorted(
            ((comparison.arm_of(run), index, run) for index, run in enumerate(runs)), key=lambda row: row[0].rank
        ),
        config=yaml.safe_dump(runs[0].config, sort_keys=False) if comparison.single else "",
        logged=any(run.n_rows for run in runs),
        lines=sum(run.n_lines for run in runs),
        rows=sum(run.n_rows for run in runs),
        no_loss=any(math.isnan(run.outcome["val_loss"]) for run in runs if run.n_rows),
        now=datetime.now().strftime("%Y-%m-%d %H:%M"),
        css=style.css_rules() + (_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(_FOLDER / "page.js").read_text(encoding="utf-8"),
        curves=_hover_json(comparison),
    )


def _rate(rate: float) -> str:
    return f"{rate:.3g}" if math.isfinite(rate) else units.UNKNOWN


def _title(comparison: Comparison) -> str:
    if comparison.single:
        return comparison.runs[0].name
    names = {str(run.setting("name")) for run in comparison.runs}
    parents = {run.folder.resolve().parent for run in comparison.runs}
    what = names.pop() if len(names) == 1 else parents.pop().name if len(parents) == 1 else "Comparison"
    return f"{what}: {len(comparison.runs)} runs"


def _model_line(comparison: Comparison) -> str:
    """The settings that all runs share; before them, in a comparison, how many runs are done."""
    settings = {key: comparison.runs[0].setting(key) for key in _MODEL_LINE if key not in comparison.differing}
    parts = [
        _MODEL_LINE[key].format(units.format_setting(value)) for key, value in settings.items() if value is not None
    ]
    if comparison.single:
        return " · ".join(parts)
    statuses = [run.status for run in comparison.runs]
    told = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return f"{told} · {' · '.join(parts)}"


def _run_tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """The outcome of one run: name, value and note of the key numbers at the top of the page."""
    outcome, step_s = run.outcome, run.column("perf/step_s")
    loss = outcome["val_loss"]
    perplexity = f"{math.exp(loss):.4g}" if loss < 50 else units.UNKNOWN
    parts = [run.column(f"grown/{unit}")[-1:] for unit in ("heads", "mlp", "layers")]
    evaluated = "the part that has joined" if any((part < 1).any() for part in parts) else "full model"
    median = units.format_step_time(float(np.nanmedian(step_s)) if np.isfinite(step_s).any() else None)
    full_flops = units.format_flops(outcome["flops_full_total"])
    return [
        ("Validation loss", units.format_loss(loss), f"perplexity {perplexity}, {evaluated}"),
        *_saved_tiles(
            units.format_percent(outcome["flops_saved"]), units.format_percent(outcome["flops_saved_blocks"])
        ),
        ("Training compute", units.format_flops(outcome["flops_total"]), f"full model: {full_flops}"),
        ("Training time", units.format_clock(outcome["train_s"]), f"median step {median}"),
        ("Tokens", units.format_count(outcome["tokens"]), f"{int(outcome['steps']):,} optimizer steps"),
    ]


def _comparison_tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The best arm, and totals over all runs."""
    best = comparison.arms[0]

    def total(name: str) -> float:
        return math.fsum(value for arm in comparison.arms for value in arm.values(name))

    def between(name: str) -> str:
        values = [arm.mean(name) for arm in comparison.arms if math.isfinite(arm.mean(name))]
        low, high = (units.format_percent(pick(values, default=None)) for pick in (min, max))
        return low if low == high else f"{low.removesuffix('%')}–{high}"

    return [
        ("Best validation loss", units.format_loss(best.mean("val_loss")), f"{best.letter}  {best.label}"),
        *_saved_tiles(between("flops_saved"), between("flops_saved_blocks")),
        ("Training time", units.format_clock(total("train_s")), "all runs together"),
        ("Training compute", units.format_flops(total("flops_total")), "all runs together"),
        ("Tokens", units.format_count(total("tokens")), "all runs together"),
    ]


def _saved_tiles(saved: str, saved_blocks: str) -> list[tuple[str, str, str]]:
    return [
        ("FLOPs saved", saved, "whole model, LM head included"),
        ("FLOPs saved, blocks", saved_blocks, "blocks alone, as the paper counts"),
    ]


def _figure(comparison: Comparison, drawing: Drawing) -> str:
    """The drawing as a `<figure>` with one SVG, or with two for wide and narrow windows."""
    data = {}
    if drawing.hover:
        data = {"hover": drawing.hover, "axis": drawing.axis.key, "title": drawing.axis.unit(comparison.runs)[1]}
    svg = style.inline_svg(drawing.figure, f"{drawing.name}-wide", drawing.description, "wide", data)
    if drawing.narrow is not None:
        svg += style.inline_svg(drawing.narrow, f"{drawing.name}-narrow", drawing.description, "narrow", data)
    return f'<figure class="{"has-narrow" if drawing.narrow is not None else ""}">{svg}</figure>'


def _hover_json(comparison: Comparison) -> str:
    """The numbers under the pointer for the page's script, safe inside a `<script>` element."""
    arms = comparison.coloured_arms
    n_runs = sum(len(arm.runs) for arm in arms)
    rows = min(_MAX_HOVER_ROWS, max(40, _MAX_HOVER_ROWS_IN_ALL // max(1, n_runs)))
    data = {
        "scale": {axis.key: axis.unit(comparison.runs)[0] for axis in known_axes(comparison)},
        "single": comparison.single,
        "arms": [
            {
                "letter": arm.letter,
                "label": arm.label,
                "series": arm.rank,
                "runs": [_hover_columns(run, rows) for run in arm.runs if run.n_rows],
            }
            for arm in arms
        ],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hover_columns(run: RunRecord, rows: int) -> dict[str, list[float | None]]:
    chosen = np.unique(np.linspace(0, run.n_rows - 1, min(rows, run.n_rows)).round().astype(int))
    train, val = train_curve(run, STEPS), run.column("val/loss")
    last_known = np.maximum.accumulate(np.where(np.isfinite(val), np.arange(run.n_rows), -1))
    columns = {axis.key: axis.values(run) for axis in AXES} | {
        "train": np.interp(run.column("step") + 1, train.x, train.y) if len(train) else run.column("train/loss"),
        "val": np.where(last_known >= 0, val[last_known], np.nan),
        "stage": run.column("stage"),
        "saved": run.column("flops/saved"),
        "blocks": run.column("flops/saved_blocks"),
    }
    return {
        key: [float(f"{value:.6g}") if np.isfinite(value) else None for value in values[chosen]]
        for key, values in columns.items()
    }
