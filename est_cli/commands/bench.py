"""est-bench: what a step of every stage costs in time and memory, against its FLOPs."""

import json
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from est_cli import benchmark, training
from est_cli.commands.entry import read_only
from est_cli.config import Count, Natural, auto, read_train_config
from est_cli.errors import UserError
from est_cli.schema import read
from est_cli.units import format_step_time

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
        task = bar.add_task("interleaved steps", total=None)
        advance = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        result = benchmark.measure.measure(benchmark.case.case_of(config), **options, progress=advance)
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
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        table.add_row(*row.values())
    return table
