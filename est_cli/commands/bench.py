"""est-bench: what a step of every stage costs in time and memory, against its FLOPs."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from est_cli import benchmark, training
from est_cli.commands.entry import read_request_and_config, run_composed
from est_cli.config import Count, Natural, auto
from est_cli.units import format_step_time


@dataclass(frozen=True)
class Request:
    """What `measure` takes."""

    rounds: Count
    warmup: Natural
    against: Literal["transformers", "nanogpt", "litgpt"] | None
    against_path: str | None
    memory: bool


def main() -> None:
    run_composed("bench", run)


def run(composed: dict[str, Any]) -> None:
    """Measure the composed config and print a table or JSON; raises UserError for bad input."""
    path, problems = composed.get("against_path"), []
    if path is not None and composed.get("against") is None:
        problems.append(f"against_path={path}: needs against=nanogpt or against=litgpt")
    request, config = read_request_and_config(Request, composed, problems)
    config, notes = auto.choose(config, training.device.available_device(config.trainer, config.kernels))
    training.device.set_threads(config.trainer.threads)
    console = Console(stderr=True)
    for note in notes:
        console.print(note, style="dim")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("interleaved steps", total=None)
        advance = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        result = benchmark.measure.measure(benchmark.case.case_of(config), **vars(request), progress=advance)
    if config.format == "json":
        print(json.dumps(result))
    else:
        _print(result, Console())


def _print(result: dict[str, Any], console: Console) -> None:
    stages = result["stages"]
    phases = [
        {"stage": str(s["stage"]), **{name: format_step_time(t) for name, t in s["phases"].items()}} for s in stages
    ]
    title = r"one optimizer step; medians over interleaved rounds \[quartiles]"
    console.print(_table(title, [benchmark.measure.stage_cells(stage) for stage in stages]), _table("phases", phases))
    if "against" in result:
        peer = result["against"]
        console.print(
            f"against {peer['name']} ({peer['setting']}): {format_step_time(peer['step_s'])}; ours takes "
            f"{benchmark.measure.shown(peer, 'time_ratio')} of its time"
        )


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    columns = (Column(name, justify="left" if name == "stage" else "right") for name in rows[0])
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row.values())
    return table
