"""est-data: prepare a corpus ahead of a run, and show what it holds."""

import sys
from dataclasses import replace
from typing import Any

from est_cli import data
from est_cli.commands.entry import read_only
from est_cli.config import Natural, read_train_config
from est_cli.errors import UserError, say
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
    if config.data.streaming:
        raise UserError("data.streaming=true: leaves nothing to prepare; est-train reads the stream as it goes")
    corpus = replace(config.data, train_tokens=None)  # how much of it a run trains on is no matter of the corpus
    store = data.tokens.prepare(corpus, config.tokenizer, config.model.vocab_size, say, sys.stderr.isatty())
    facts = data.tokens.inspect(store, samples)
