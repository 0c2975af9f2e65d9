"""est-data: prepare a corpus ahead of a run, and show what it holds."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from est_cli.commands.entry import read_only
from est_cli.config import Natural, read_train_config
from est_cli.errors import UserError
from est_cli.schema import read


def main() -> None:
    read_only("prepare", run)


def run(plain: dict[str, Any]) -> None:
    """Prepare (or find) the token files of the composed config and print what they hold. Raises UserError."""
    problems: list[str] = []
    samples = read(Natural, plain.pop("samples"), "samples", problems)
    try:
        config = read_train_config(plain)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    from est_cli.data.inspection import inspect
    from est_cli.data.tokens import prepare

    store = prepare(config.data, config.tokenizer, config.model.vocab_size, _say, sys.stderr.isatty())
    facts = inspect(store, samples)
    if config.format == "json":
        print(json.dumps(facts))
    else:
        _print(facts, Console())


def _print(facts: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{facts['tokenizer']['vocab_size']:,} ids ({facts['tokenizer']['kind']})", title_justify="left"
    )
    table.add_column("split")
    for column in ("documents", "tokens", "bytes", "bytes/token", "unigram entropy"):
        table.add_column(column, justify="right")
    for name, split in facts["splits"].items():
        table.add_row(
            name,
            f"{split['documents']:,}",
            f"{split['tokens']:,}",
            f"{split['bytes']:,}",
            f"{split['bytes_per_token']:.3f}",
            f"{split['unigram_entropy_nats']:.3f} nats",
        )
    console.print(table)
    for sample in facts["samples"]:
        console.print(Panel(Text(sample)))
    console.print(f"folder: {facts['folder']}", soft_wrap=True, highlight=False)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
