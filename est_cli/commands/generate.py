"""est-generate: sample text from a run."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from est_cli import evaluation
from est_cli.commands.entry import read_request, run_composed
from est_cli.config import Count, Format, Natural, NotNegative
from est_cli.errors import say


@dataclass(frozen=True)
class Request:
    run: str | None
    prompt: str
    max_tokens: Count
    temperature: NotNegative
    top_k: Count | None
    seed: Natural
    format: Format


def main() -> None:
    prompt = take_prompt(sys.argv)
    run_composed("generate", lambda composed: run(composed if prompt is None else {**composed, "prompt": prompt}))


def take_prompt(arguments: list[str]) -> str | None:
    """Remove `prompt=` and return its text as the shell gave it: Hydra would strip its spaces and read its brackets.

    A prompt in Hydra's own quotes is left to Hydra.
    """
    taken = [a for a in arguments[1:] if re.match("prompt=(?!['\"])", a)]
    for argument in taken:
        arguments.remove(argument)
    return taken[-1].removeprefix("prompt=") if taken else None


def run(composed: dict[str, Any]) -> None:
    """Continue `prompt=`, printed as it comes; raises UserError for bad input."""
    request = read_request(Request, composed, run="a run directory")
    opened = evaluation.run.open_run(Path(request.run), say)
    tokenizer = evaluation.run.run_tokenizer(opened, say)
    decoding = evaluation.generation.Decoding(request.max_tokens, request.temperature, request.top_k, request.seed)
    pieces = evaluation.generation.generate_text(opened.model, tokenizer, request.prompt, decoding)
    if request.format == "json":
        texts, counts = zip(*pieces, strict=True) if (pieces := list(pieces)) else ((), ())
        print(json.dumps({"prompt": request.prompt, "text": "".join(texts), "tokens": sum(counts)}))
        return
    print(request.prompt, end="", flush=True)
    for text, _ in pieces:
        print(text, end="", flush=True)
    print()
