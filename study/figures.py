"""The figures of docs/study.md, drawn in the reports' style, from the records only."""

from collections.abc import Callable, Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from est_cli.experiments.saving import Frontier
from est_cli.reports.style import report_style, series
from study.grid import ARMS, FULL, LEARNING_RATES, SEEDS, SIZES, SMALL, WINNER, runs_with
from study.records import Records
from study.results import frontier_of, headline, result_of, screened
from study.tables import losses_by_rate

Panels = Iterator[Callable[[Axes], None]]
"""The functions that draw a figure's panels; none if there is nothing to show."""

_WIDE, _NARROW, _HEIGHT = 8.4, 6.3, 3.5
_NAMED = 5
"""How many schedules the screens' figure names, best first. Those whose names would overlap have none."""


def _learning_rates(records: Records) -> Panels:
    losses = {arm: losses_by_rate(records, name) for name, arm in ARMS.items()}
    tried = {arm: known for arm, known in losses.items() if len(known) > 1}

    def draw(ax: Axes) -> None:
        for rank, (arm, known) in enumerate(tried.items()):
            ax.plot([float(lr) for lr in known], list(known.values()), **_look(rank), label=arm.says)
        ax.set_xscale("log", base=2)
        ax.set_xticks([float(lr) for lr in LEARNING_RATES], [f"{float(lr):g}" for lr in LEARNING_RATES])
        ax.minorticks_off()
        ax.set(xlabel="Peak learning rate", ylabel="Validation loss at the end")

    if tried:
        yield draw


def _headline(records: Records) -> Panels:
    for size in SIZES:
        results = {arm: result for arm, result in headline(records, size).items() if np.isfinite(result.share)}
        frontiers = result_of(records, runs_with(group="headline", size=size, arm=ARMS[FULL])).full.frontiers["flops"]
        full = Frontier.mean(list(frontiers.values()))

        def draw(ax: Axes, size=size, results=results, full=full) -> None:
            _against_flops(ax, full)
            others = [arm for arm in results if not arm.is_full]
            for arm, result in results.items():
                rank = 0 if arm.is_full else 1 + others.index(arm)
                seeds = [result.share] * len(result.losses)
                ax.plot(seeds, result.losses, ".", color=series(rank), alpha=0.5, markeredgewidth=0)
                if rank:
                    ax.plot(result.share, np.mean(result.losses), **_look(rank), linestyle="", label=arm.says)
            ax.set_title(_title(size), loc="left")

        if results:
            yield draw


def _curves(records: Records) -> Panels:
    arms = (ARMS[FULL], ARMS[WINNER])
    for size in SIZES:
        runs = [records.of(runs_with(group="headline", size=size, arm=arm, seed=SEEDS[0])) for arm in arms]

        def draw(ax: Axes, size=size, runs=runs) -> None:
            for rank, (arm, [run]) in enumerate(zip(arms, runs, strict=True)):
                flops = run.column("flops/total") / 1e12
                ax.plot(flops, run.column("train/loss"), color=series(rank), label=arm.says)
            # Without the steep beginning.
            late = np.concatenate([run.column("train/loss")[run.n_rows // 8 :] for [run] in runs])
            ax.set_ylim(late.min() - 0.05 * np.ptp(late), late.max())
            ax.set_title(_title(size), loc="left")
            ax.set(xlabel="Training compute, whole model (TFLOP)", ylabel="Training loss, text not seen before")

        if all(runs):
            yield draw


def _screens(records: Records) -> Panels:
    results = [(run.arm.says, r) for run, r in screened(records, SMALL) if np.isfinite(r.share)]

    def draw(ax: Axes) -> None:
        [full] = runs_with(group="short", size=SMALL, arm=ARMS[FULL], seed=SEEDS[0])
        _against_flops(ax, frontier_of(records, full))
        ax.plot([r.share for _, r in results], [r.losses for _, r in results], **_look(1), linestyle="")
        heights: list[float] = []
        for says, result in results:
            [loss], apart = result.losses, 0.05 * np.ptp(ax.get_ylim())
            if len(heights) < _NAMED and all(abs(loss - other) > apart for other in heights):
                ax.annotate(says, (result.share, loss), (5, 0), textcoords="offset points", va="center", fontsize=7.5)
                heights.append(loss)

    if results:
        yield draw


FIGURES: dict[str, tuple[str, Callable[[Records], Panels]]] = {
    "headline": ("Loss at the end against the share of the full run's FLOPs, every seed", _headline),
    "curves": ("Training loss against FLOPs of the full model and the best schedule", _curves),
    "learning-rates": ("Loss at the end over the learning rate", _learning_rates),
    "screens": ("Loss at the end of every schedule against the share of the full run's FLOPs", _screens),
}
"""By file name: what a figure shows, and its panels."""


def drawn(records: Records) -> dict[str, Figure]:
    """The figures that have something to show; they must be saved in the reports' style too."""
    figures = {}
    with report_style():
        for name, (_, panels_of) in FIGURES.items():
            if panels := list(panels_of(records)):
                figure = figures[name] = Figure(figsize=(_WIDE if len(panels) > 1 else _NARROW, _HEIGHT))
                for draw, ax in zip(panels, figure.subplots(1, len(panels), squeeze=False).flat, strict=True):
                    draw(ax)
                    if ax.get_legend_handles_labels()[0]:
                        ax.legend(frameon=False)
    return figures


def _against_flops(ax: Axes, full: Frontier) -> None:
    """The full model's line, on axes on which it is straight, as losses between its runs are interpolated."""
    if len(full.loss):
        ax.plot(full.cost / full.cost[-1], full.loss, **_look(0), label="full model, fewer steps")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator([0.05, 0.1, *np.arange(2, 11) / 10]))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set(xlabel="FLOPs, share of the full model's whole run", ylabel="Validation loss at the end")


def _look(rank: int) -> dict[str, object]:
    return {"color": series(rank), "marker": "os^DvPX"[rank % 7], "markersize": 4.5, "linewidth": 1.4}


def _title(size: str) -> str:
    layers, width, _ = SIZES[size]
    return f"{layers} layers of width {width}"
