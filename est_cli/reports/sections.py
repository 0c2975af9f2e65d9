"""The page's sections, from the loss to what differs between configs."""

from collections.abc import Sequence
from html import escape

import yaml

from est_cli.reports.arms import Comparison
from est_cli.reports.axes import run_with_shared_stages
from est_cli.reports.coverage import Coverage
from est_cli.reports.figures import Drawing
from est_cli.reports.html_tables import chip, differences_table, full_model_arm, results_table, stages_table
from est_cli.reports.svg import inline_svg


def sections(comparison: Comparison, drawings: Sequence[Drawing], found: Coverage | str) -> list[str]:
    """All sections that these runs have something for."""
    by_name = {drawing.name: drawing for drawing in drawings}
    losses = [drawing for drawing in drawings if drawing.hover == "loss"]
    if losses:
        first = [_loss_section(comparison, losses), _cost_section(comparison, by_name)]
    else:
        first = ["<p>No step has been logged yet. Make the report again once the first ones are done.</p>"]
    return [
        *first,
        _results_section(comparison),
        _sweep_section(by_name),
        _stages_section(comparison),
        _coverage_section(comparison, by_name, found),
        _config_section(comparison),
    ]


def _loss_section(comparison: Comparison, losses: Sequence[Drawing]) -> str:
    inputs = "".join(
        f'<input class="choice" type="radio" name="axis" id="axis-{d.axis.key}"{"" if position else " checked"}>'
        for position, d in enumerate(losses)
    )
    labels = "".join(f'<label for="axis-{d.axis.key}">{escape(d.axis.title)}</label>' for d in losses)
    views = "".join(f'<div class="view view-{d.axis.key}">{_figure(comparison, d)}</div>' for d in losses)
    caption = (
        "Dots: validation loss of the full model. Thin line: training loss, smoothed over 1% of the run; "
        "in stages that sample it is the loss of the subnetworks."
    )
    if any((run.column("grown/layers") < 1).any() for run in comparison.runs):
        caption += " Until layers have joined, both are of the part that has."
    grey = len(comparison.arms) > len([arm for arm in comparison.arms if arm.coloured])
    caption += " The best configurations are coloured, the others grey." if grey else ""
    if any(len(run.stages) > 1 for run in comparison.runs) and any(
        run_with_shared_stages(comparison, drawing.axis) is None for drawing in losses
    ):
        caption += " Strips above a plot are the stages of each configuration, darker for smaller subnetworks."
    return (
        f'<section><h2>Loss</h2>{inputs}<div class="choices">{labels}</div><div class="views">{views}</div>'
        f'{_legend(comparison)}<p class="caption">{caption}</p></section>'
    )


def choice_rules(drawings: Sequence[Drawing]) -> str:
    """CSS that shows the loss against the axis that is chosen; it works without the script."""
    return "".join(_rules_of_choice(drawing.axis.key) for drawing in drawings if drawing.hover == "loss")


def _rules_of_choice(key: str) -> str:
    return (
        f"@media screen{{#axis-{key}:checked~.views .view-{key}{{display:block}}"
        f"#axis-{key}:checked~.choices label[for=axis-{key}]{{background:var(--paper);color:var(--ink);"
        f"box-shadow:0 0 2px var(--rest)}}"
        f"#axis-{key}:focus-visible~.choices label[for=axis-{key}]{{outline:2px solid var(--series-0)}}}}\n"
    )


def _legend(comparison: Comparison, css_class: str = "legend") -> str:
    if comparison.single:
        return ""
    arms = [arm for arm in comparison.arms if arm.coloured]
    return f'<div class="{css_class}">' + "".join(f"<span>{chip(a)} {escape(a.label)}</span>" for a in arms) + "</div>"


def _cost_section(comparison: Comparison, by_name: dict[str, Drawing]) -> str:
    saved = (
        f"<section><h2>FLOPs saved</h2>{_figure(comparison, by_name['savings'])}"
        '<p class="caption">Solid: of the whole model, LM head included. Dashed: of the transformer blocks alone, '
        "as the paper counts. Both up to that step, against training the full model.</p></section>"
    )
    if "stage_time" not in by_name:
        return saved
    time = (
        f"<section><h2>Step time</h2>{_figure(comparison, by_name['stage_time'])}"
        '<p class="caption">Median, middle half and 5–95% of the steps; × is against the full model’s stage. '
        "A diamond marks where the FLOPs alone would put the median.</p></section>"
    )
    legend = _legend(comparison, "legend always")
    return f'<div class="pair">{saved}{time}</div>{legend}'


def _results_section(comparison: Comparison) -> str:
    if comparison.single:
        return ""
    spread = any(len(arm.runs) > 1 for arm in comparison.arms)
    caption = "Means over seeds ± sample standard deviation. " if spread else ""
    baseline = full_model_arm(comparison)
    caption += f"Times with × are against {baseline.letter}, {escape(baseline.label)}." if baseline else ""
    return f'<section><h2>Results, best first</h2>{results_table(comparison)}<p class="caption">{caption}</p></section>'


def _sweep_section(by_name: dict[str, Drawing]) -> str:
    maps = [drawing for name, drawing in by_name.items() if name.startswith("sweep_")]
    if not maps:
        return ""
    figures = "".join(_figure(None, drawing) for drawing in maps)
    return (
        f'<section><h2>Sweep</h2><div>{figures}</div><p class="caption">Final validation loss, the mean '
        "over all runs of a cell. Brighter is better; the best cell is framed.</p></section>"
    )


def _stages_section(comparison: Comparison) -> str:
    if not any(run.n_rows for run in comparison.runs):
        return ""
    content = stages_table(comparison)
    return (
        f"<section><h2>Stages</h2>{content}</section>"
        if comparison.single or len(comparison.arms) <= 3
        else f"<section><details><summary>Stages of all configurations</summary>{content}</details></section>"
    )


def _coverage_section(comparison: Comparison, by_name: dict[str, Drawing], found: Coverage | str) -> str:
    heading = "<h2>How often every part was trained</h2>"
    if isinstance(found, str):
        return f'<section>{heading}<p class="caption">Not known for this run: {escape(found)}.</p></section>'
    whose = "" if comparison.single else f"The best run that samples, {escape(found.run.name)}. "
    counted = "Every plan counted."
    if found.thinned:
        counted = (
            f"Counted on {found.plans_drawn:,} of the run’s {found.plans_in_run:,} plans, evenly taken from "
            f"every stage and scaled, so a head’s share is good to ±{100 * found.noise:.1f} points."
        )
    figure = _figure(comparison, by_name["coverage"])
    return (
        f'<section>{heading}<div class="strips">{figure}</div><p class="caption">{whose}Share of '
        f"{found.run.steps_done:,} optimizer steps, in percent. {counted} Even rows mean that no part was left "
        "behind.</p></section>"
    )


def _config_section(comparison: Comparison) -> str:
    if not any(run.config for run in comparison.runs):
        return ""
    if comparison.single:
        text = yaml.safe_dump(comparison.runs[0].config, sort_keys=False)
        return (
            "<section><h2>Configuration</h2><details><summary>config.yaml</summary>"
            f"<pre>{escape(text)}</pre></details></section>"
        )
    if not comparison.differing:
        return "<section><h2>What differs</h2><p>The runs have equal configurations.</p></section>"
    return f"<section><h2>What differs</h2>{differences_table(comparison)}</section>"


def _figure(comparison: Comparison | None, drawing: Drawing) -> str:
    pictures = [("wide", drawing.figure), ("narrow", drawing.narrow)]
    svgs = [
        inline_svg(figure, f"{drawing.name}-{kind}", drawing.description, kind)
        for kind, figure in pictures
        if figure is not None
    ]
    if drawing.hover and comparison is not None:
        title = drawing.axis.unit(comparison.runs)[1]
        extra = f'<svg data-hover="{drawing.hover}" data-axis="{drawing.axis.key}" data-title="{escape(title)}" '
        svgs = [svg.replace("<svg ", extra, 1) for svg in svgs]
    return f'<figure class="{"has-narrow" if drawing.narrow is not None else ""}">{"".join(svgs)}</figure>'
