"""est-bench: what a step of every stage costs in time and memory, against its FLOPs."""

import json
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from est_cli.commands.entry import read_only
from est_cli.config import Count, Natural, auto, read_train_config
from est_cli.errors import UserError
from est_cli.schema import read
from est_cli.units import format_bytes, format_flops, format_interval, format_percent, format_step_time


def main() -> None:
    read_only("bench", run)


def run(plain: dict[str, Any]) -> None:
    """Measure the composed config and print a table or JSON; raises UserError for bad input."""
    problems: list[str] = []
    rounds = read(Count, plain.pop("rounds"), "rounds", problems)
    warmup = read(Natural, plain.pop("warmup"), "warmup", problems)
    against = read(Literal["transformers", "nanogpt", "litgpt"] | None, plain.pop("against"), "against", problems)
    path = read(str | None, plain.pop("against_path"), "against_path", problems)
    if path is not None and against is None and not problems:
        problems.append(f"against_path={path}: needs against=nanogpt or against=litgpt")
    memory = read(bool, plain.pop("memory"), "memory", problems)
    try:
        config = read_train_config(plain)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    import torch

    from est_cli.benchmark.case import case_of
    from est_cli.benchmark.measure import measure
    from est_cli.training.device import available_device

    config, notes = auto.choose(config, available_device(config.trainer, config.kernels))
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    console = Console(stderr=True)
    for note in notes:
        console.print(note, style="dim")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("interleaved rounds", total=None)
        result = measure(
            case_of(config),
            rounds,
            warmup,
            against,
            path,
            memory,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if config.format == "json":
        print(json.dumps(result))
    else:
        _print(result, Console())


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table(title="one optimizer step; medians over interleaved rounds [quartiles]", title_justify="left")
    table.add_column("stage")
    for column in ("time", "FLOPs", "time / full", "FLOPs / full", "efficiency", "peak memory", "MFU"):
        table.add_column(column, justify="right")
    for stage in result["stages"]:
        table.add_row(
            str(stage["stage"]),
            format_step_time(stage["step_s"]),
            format_flops(stage["flops"]),
            format_interval(stage["time_ratio"], stage["time_ratio_quartiles"]),
            f"{stage['flops_ratio']:.3f}",
            format_interval(stage["efficiency"], stage["efficiency_quartiles"]),
            format_bytes(stage["peak_memory_bytes"]),
            format_percent(stage["mfu"]),
        )
    console.print(table)
    phases = Table(title="phases", title_justify="left")
    phases.add_column("stage")
    for name in result["stages"][0]["phases"]:
        phases.add_column(name, justify="right")
    for stage in result["stages"]:
        phases.add_row(str(stage["stage"]), *(format_step_time(s) for s in stage["phases"].values()))
    console.print(phases)
    if "against" in result:
        peer = result["against"]
        console.print(
            f"against {peer['name']} ({peer['setting']}): {format_step_time(peer['step_s'])}; ours takes "
            f"{format_interval(peer['time_ratio'], peer['time_ratio_quartiles'])} of its time"
        )
