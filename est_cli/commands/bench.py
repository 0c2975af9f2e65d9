"""est-bench: what a step of every stage costs in time and memory, against its FLOPs."""

import json
from collections.abc import Iterable
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from est_cli import benchmark, training
from est_cli.commands.entry import read_only
from est_cli.config import Count, Natural, auto, read_train_config
from est_cli.errors import UserError
from est_cli.schema import read
from est_cli.units import format_bytes, format_flops, format_interval, format_percent, format_step_time

_OPTIONS = {
    "rounds": Count,
    "warmup": Natural,
    "against": Literal["transformers", "nanogpt", "litgpt"] | None,
    "against_path": str | None,
    "memory": bool,
}
"""What `measure` takes."""


def main() -> None:
    read_only("bench", run)


def run(plain: dict[str, Any]) -> None:
    """Measure the composed config and print a table or JSON; raises UserError for bad input."""
    problems: list[str] = []
    options = {key: read(kind, plain.pop(key), key, problems) for key, kind in _OPTIONS.items()}
    if options["against_path"] is not None and options["against"] is None and not problems:
        problems.append(f"against_path={options['against_path']}: needs against=nanogpt or against=litgpt")
    try:
        config = read_train_config(plain)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    config, notes = auto.choose(config, training.device.available_device(config.trainer, config.kernels))
    training.device.set_threads(config.trainer.threads)
    console = Console(stderr=True)
    for note in notes:
        console.print(note, style="dim")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("interleaved rounds", total=None)
        advance = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        result = benchmark.measure.measure(benchmark.case.case_of(config), **options, progress=advance)
    if config.format == "json":
        print(json.dumps(result))
    else:
        _print(result, Console())


def _print(result: dict[str, Any], console: Console) -> None:
    steps = _table(
        r"one optimizer step; medians over interleaved rounds \[quartiles]",
        ("time", "FLOPs", "time / full", "FLOPs / full", "efficiency", "peak memory", "MFU"),
    )
    phases = _table("phases", result["stages"][0]["phases"])
    for stage in result["stages"]:
        steps.add_row(
            str(stage["stage"]),
            format_step_time(stage["step_s"]),
            format_flops(stage["flops"]),
            format_interval(stage["time_ratio"], stage["time_ratio_quartiles"]),
            f"{stage['flops_ratio']:.3f}",
            format_interval(stage["efficiency"], stage["efficiency_quartiles"]),
            format_bytes(stage["peak_memory_bytes"]),
            format_percent(stage["mfu"]),
        )
        phases.add_row(str(stage["stage"]), *map(format_step_time, stage["phases"].values()))
    console.print(steps, phases)
    if "against" in result:
        peer = result["against"]
        console.print(
            f"against {peer['name']} ({peer['setting']}): {format_step_time(peer['step_s'])}; ours takes "
            f"{format_interval(peer['time_ratio'], peer['time_ratio_quartiles'])} of its time"
        )


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table("stage", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table
