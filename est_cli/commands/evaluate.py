"""est-eval: validation loss, perplexity and bits per byte of a run's newest checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from est_cli.commands.entry import read_only
from est_cli.config import Count
from est_cli.errors import UserError
from est_cli.schema import read


def main() -> None:
    read_only("eval", run)


def run(plain: dict[str, Any]) -> None:
    """Print the evaluation of the run that `run=` names; raises UserError for bad input."""
    problems: list[str] = []
    folder = read(str | None, plain["run"], "run", problems)
    tokens = read(Count | None, plain["tokens"], "tokens", problems)
    if folder is None and not problems:
        problems.append("run: is missing; must be a run directory")
    if problems:
        raise UserError(*problems)
    from est_cli.data.tokens import prepare
    from est_cli.evaluation.loss import evaluate
    from est_cli.evaluation.run import open_run

    opened = open_run(Path(folder), _warn)
    config = opened.config
    store = prepare(config.data, config.tokenizer, config.model.vocab_size, _warn, sys.stderr.isatty())
    loss = evaluate(opened, store.val, store.tokenizer.token_bytes, tokens or config.trainer.eval_tokens)
    facts = {
        "step": opened.checkpoint.step - 1,
        "val_loss": loss.val_loss,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "tokens": loss.tokens,
    }
    if plain["format"] == "json":
        print(json.dumps(facts))
        return
    table = Table("step", "validation loss", "perplexity", "bits per byte", "tokens")
    table.add_row(
        str(facts["step"]),
        f"{loss.val_loss:.4f}",
        f"{loss.perplexity:.2f}",
        f"{loss.bits_per_byte:.4f}",
        str(loss.tokens),
    )
    Console().print(table)


def _warn(message: str) -> None:
    print(message, file=sys.stderr)
