"""The HTML page: one file, no network, readable without its script."""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template

from est_cli.reports import palette, sections
from est_cli.reports.arms import Comparison
from est_cli.reports.coverage import Coverage
from est_cli.reports.figures import Drawing
from est_cli.reports.hover import hover_json
from est_cli.reports.records import RunRecord
from est_cli.reports.tiles import tiles
from est_cli.units import format_setting


def page(comparison: Comparison, drawings: Sequence[Drawing], found: Coverage | str) -> str:
    """The whole document. `found` is the coverage, or why there is none."""
    body = [
        _header(comparison),
        tiles(comparison),
        *sections.sections(comparison, drawings, found),
        _footer(comparison),
    ]
    return Template(_beside("page.html")).substitute(
        title=escape(_title(comparison)),
        style=palette.css_rules() + _beside("page.css") + sections.choice_rules(drawings),
        body="\n".join(part for part in body if part),
        curves=hover_json(comparison),
        script=_beside("page.js"),
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _title(comparison: Comparison) -> str:
    if comparison.single:
        return comparison.runs[0].name
    names = {str(run.setting("name")) for run in comparison.runs}
    parents = {run.folder.resolve().parent for run in comparison.runs}
    what = names.pop() if len(names) == 1 else parents.pop().name if len(parents) == 1 else "Comparison"
    return f"{what}: {len(comparison.runs)} runs"


def _header(comparison: Comparison) -> str:
    title = f'<p class="eyebrow">Evolving Subnetwork Training</p><h1>{escape(_title(comparison))}</h1>'
    if comparison.single:
        run = comparison.runs[0]
        return f'<header>{title}<p class="lead">{escape(_model_line(run))}</p>{_progress(run)}</header>'
    statuses = [run.status for run in comparison.runs]
    told = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    line = f"{told} · {_model_line(comparison.runs[0], shared=comparison)}"
    return f'<header>{title}<p class="lead">{escape(line)}</p></header>'


def _model_line(run: RunRecord, shared: Comparison | None = None) -> str:
    """The settings that a reader asks for first; in a comparison only those that all runs share."""
    parts = [
        ("{} layers", "model.n_layers"),
        ("{} heads", "model.n_heads"),
        ("width {}", "model.d_model"),
        ("MLP {}", "model.d_ff"),
        ("vocabulary {}", "model.vocab_size"),
        ("data {}", "data.kind"),
        ("sequences of {}", "data.seq_len"),
        ("learning rate {}", "optimizer.lr"),
        ("seed {}", "seed"),
    ]
    known = [
        text.format(format_setting(run.setting(key)))
        for text, key in parts
        if run.setting(key) is not None and (shared is None or key not in shared.differing)
    ]
    return " · ".join(known)


def _progress(run: RunRecord) -> str:
    planned = run.setting("trainer.max_steps")
    steps = f"step {run.steps_done:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    status = f'<p><span class="status">{escape(run.status)}</span> {steps}</p>'
    if run.status == "done" or not isinstance(planned, int) or planned < 1:
        return status
    percent = min(100.0, 100 * run.steps_done / planned)
    return f'{status}<div class="progress"><span style="width:{percent:.1f}%"></span></div>'


def _footer(comparison: Comparison) -> str:
    lines = sum(run.n_lines for run in comparison.runs)
    rows = sum(run.n_rows for run in comparison.runs)
    read = f"Read {lines:,} logged lines"
    read += f", of which {rows:,}, evenly taken, and every validation loss are drawn." if rows < lines else "."
    problems: Iterable[str] = (problem for run in comparison.runs for problem in run.problems)
    parts = [
        f"Made {datetime.now().strftime('%Y-%m-%d %H:%M')}. {read}",
        "FLOPs are matrix-multiplication FLOPs, forward and backward. Validation is always the full model, "
        "or in a run that grows what has joined by then. "
        "Method: Evolving Subnetwork Training, arXiv 2406.06962.",
    ]
    if any(math.isnan(run.outcome["val_loss"]) for run in comparison.runs if run.n_rows):
        parts.append("Runs without a validation loss stand last.")
    return "<footer>" + "".join(f"<p>{escape(part)}</p>" for part in [*parts, *problems]) + "</footer>"
