"""est-data: prepare a corpus ahead of a run, and show what it holds."""

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from est_cli import data
from est_cli.commands.entry import read_request_and_config, run_composed
from est_cli.config import Natural
from est_cli.errors import UserError, say


@dataclass(frozen=True)
class Request:
    samples: Natural
    """Decoded excerpts to show."""


def main() -> None:
    run_composed("prepare", run)


def run(composed: dict[str, Any]) -> None:
    """Prepare (or find) the token files of the composed config and print what they hold. Raises UserError."""
    request, config = read_request_and_config(Request, composed)
    if config.data.streaming:
        raise UserError("data.streaming=true: leaves nothing to prepare; est-train reads the stream as it goes")
    corpus = replace(config.data, train_tokens=None)  # data.train_tokens limits a run, not the corpus
    store = data.tokens.open_store(corpus, config.tokenizer, config.model.vocab_size, say, sys.stderr.isatty())
    facts = data.tokens.inspect(store, request.samples)
    if config.format == "json":
        print(json.dumps(facts))
    else:
        _print(facts, Console())


def _print(facts: dict[str, Any], console: Console) -> None:
    title = f"{facts['tokenizer']['vocab_size']:,} ids ({facts['tokenizer']['kind']})"
    numbers = _numbers("documents", "tokens", "bytes", "bytes/token", "unigram entropy")
    table = Table("split", *numbers, title=title, title_justify="left")
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
    if facts["mixture"]:
        console.print(_mixture_table(facts["mixture"]))
    if facts["packages"]:
        console.print(_package_table(facts["packages"]))
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in facts["source"]["left_out"].items())
        console.print(f"files left out: {left_out or 'none'}", highlight=False)
    for sample in facts["samples"]:
        console.print(Panel(Text(sample)))
    tokenizing = facts["tokenizing"]
    processes = f"{tokenizing['processes']} process{'es' if tokenizing['processes'] > 1 else ''}"
    console.print(f"tokenized at {tokenizing['mb_per_s']:.1f} MB/s by {processes}", highlight=False)
    console.print(f"folder: {facts['folder']}", soft_wrap=True, highlight=False)


def _package_table(packages: dict[str, dict[str, int]]) -> Table:
    """How many packages each split has, and which are the largest."""
    table = Table("split", *_numbers("packages"), "the largest, MB", title="packages", title_justify="left")
    for name, sizes in packages.items():
        largest = ", ".join(f"{package} {n_bytes / 1e6:.1f}" for package, n_bytes in list(sizes.items())[:4])
        table.add_row(name, f"{len(sizes):,}", Text(largest))
    return table


def _mixture_table(mixture: list[dict[str, Any]]) -> Table:
    """Each source's weight, its actual share of each split, and how often it was read."""
    numbers = _numbers("weight", "train", "used", "val", "used")
    table = Table("source", *numbers, title="mixture", title_justify="left")
    for source in mixture:
        splits = (source["splits"][name] for name in ("train", "val"))
        cells = [cell for split in splits for cell in (f"{split['share']:.2%}", f"{split['passes']:.2f} times")]
        table.add_row(Text(str(source["path"])), f"{source['weight']:.2%}", *cells)
    return table


def _numbers(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]
