"""est-eval: loss, perplexity and bits per byte, or downstream tasks, of one run or of several side by side."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from est_cli import evaluation
from est_cli.commands.entry import read_request, run_composed
from est_cli.config import Count, DataConfig, Format, Natural, as_plain, read_train_config
from est_cli.errors import UserError, say


@dataclasses.dataclass(frozen=True)
class Request:
    """The runs, and what to evaluate them on."""

    run: str | tuple[str, ...] | None
    format: Format
    tokens: Count | None
    tasks: tuple[str, ...]
    tasks_dir: str | None
    limit: Count | None
    num_fewshot: Natural | None
    data: DataConfig | None = None


def main() -> None:
    run_composed("eval", run)


def run(composed: dict[str, Any]) -> None:
    """Print the evaluation of what `run=` names; raises UserError for bad input."""
    request = read_request(Request, composed, run="a run directory, or a list of them")
    folders = [request.run] if isinstance(request.run, str) else list(request.run)
    found = [_evaluate(folder, request) for folder in folders]
    if request.format == "text":
        table = _tasks_table if request.tasks else _loss_table
        Console().print(table(short_names(folders), found))
    elif isinstance(request.run, str):
        print(json.dumps(found[0]))
    else:
        runs = [{"run": folder, **facts} for folder, facts in zip(folders, found, strict=True)]
        print(json.dumps({"runs": runs}))


def _evaluate(folder: str, request: Request) -> dict[str, Any]:
    opened = evaluation.run.open_run(Path(folder), say)
    facts = _tasks(opened, request) if request.tasks else _loss(opened, request)
    return {"step": opened.checkpoint.step - 1, **facts}


def _loss(opened: "evaluation.run.OpenRun", request: Request) -> dict[str, Any]:
    config, data = opened.config, request.data
    if data is not None:
        read_train_config(as_plain(dataclasses.replace(config, data=data)))
    seq_len = None if data is None or data.seq_len == "auto" else data.seq_len
    store = evaluation.run.run_store(opened, say, data)
    n_tokens = request.tokens or config.trainer.eval_tokens
    return evaluation.loss.evaluate(opened, store.val, store.val_bytes, n_tokens, seq_len)


def _tasks(opened: "evaluation.run.OpenRun", request: Request) -> dict[str, Any]:
    try:
        evaluate_tasks = evaluation.tasks.evaluate_tasks
    except ImportError as error:
        raise UserError(f"tasks: needs lm-eval (pip install 'est-cli[tasks]'); {error}") from None
    tasks_dir = None if request.tasks_dir is None else Path(request.tasks_dir).expanduser().absolute()
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise UserError(f"tasks_dir={request.tasks_dir}: must be a folder with task files")
    tokenizer = evaluation.run.run_tokenizer(opened, say)
    return {"tasks": evaluate_tasks(opened, tokenizer, request.tasks, tasks_dir, request.limit, request.num_fewshot)}


def short_names(folders: list[str]) -> list[str]:
    """What tells the runs apart: their paths without what they share."""
    paths = [Path(folder).absolute() for folder in folders]
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(shared)) for path in paths]


def _loss_table(names: list[str], found: list[dict[str, Any]]) -> Table:
    numbers = ("step", "val loss", "perplexity", "bits per byte", "tokens")
    table = Table("run", *(Column(name, justify="right") for name in numbers))
    for name, facts in zip(names, found, strict=True):
        table.add_row(
            name,
            str(facts["step"]),
            f"{facts['val_loss']:.4f}",
            f"{facts['perplexity']:.2f}",
            f"{facts['bits_per_byte']:.4f}",
            str(facts["tokens"]),
        )
    return table


def _tasks_table(names: list[str], found: list[dict[str, Any]]) -> Table:
    table = Table("task", "metric", *(Column(name, justify="right", overflow="fold") for name in names))
    for task, metrics in found[0]["tasks"].items():
        for metric in (name for name in metrics if "_stderr" not in name):
            table.add_row(task, metric, *(_with_error(facts["tasks"][task], metric) for facts in found))
    return table


def _with_error(metrics: dict[str, float], metric: str) -> str:
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
