"""est-generate: sample text from a run."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from est_cli import evaluation
from est_cli.commands.entry import read_only
from est_cli.config import Count, Format, Natural, NotNegative
from est_cli.errors import UserError, say
from est_cli.schema import read


def main() -> None:
    prompt = take_prompt(sys.argv)
    read_only("generate", lambda plain: run(plain if prompt is None else {**plain, "prompt": prompt}))


def take_prompt(arguments: list[str]) -> str | None:
    """Remove `prompt=` and return its text as the shell gave it: Hydra would strip its spaces and read its brackets.

    A prompt in Hydra's own quotes is left to Hydra.
    """
    taken = [a for a in arguments[1:] if re.match("prompt=(?!['\"])", a)]
    for argument in taken:
        arguments.remove(argument)
    return taken[-1].removeprefix("prompt=") if taken else None


def run(plain: dict[str, Any]) -> None:
    """Continue `prompt=`, printed as it comes; raises UserError for bad input."""
    problems: list[str] = []
    folder = read(str | None, plain["run"], "run", problems)
    types = {"max_tokens": Count, "temperature": NotNegative, "top_k": Count | None, "seed": Natural}
    decoding = {key: read(type_, plain[key], key, problems) for key, type_ in types.items()}
    prompt = "" if plain["prompt"] is None else str(plain["prompt"])
    kind = read(Format, plain["format"], "format", problems)
    if folder is None:
        problems.append("run: is missing; must be a run directory")
    if problems:
        raise UserError(*problems)
    opened = evaluation.run.open_run(Path(folder), say)
    tokenizer = evaluation.run.run_tokenizer(opened, say)
    decoding = evaluation.generation.Decoding(**decoding)
    pieces = evaluation.generation.generate_text(opened.model, tokenizer, prompt, decoding)
    if kind == "json":
        texts, counts = zip(*pieces, strict=True) if (pieces := list(pieces)) else ((), ())
        print(json.dumps({"prompt": prompt, "text": "".join(texts), "tokens": sum(counts)}))
        return
    print(prompt, end="", flush=True)
    for text, _ in pieces:
        print(text, end="", flush=True)
    print()
