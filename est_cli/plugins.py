"""Functions that a config names: ours by a word, a person's own by a dotted path."""

import importlib
from collections.abc import Callable, Mapping

from est_cli.errors import UserError, nearest


def named_function(name: str, known: Mapping[str, Callable], key: str) -> Callable:
    """An entry of `known`, or what a dotted path imports. Raises UserError."""
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module or name.startswith("."):
        allowed = ", ".join(known)
        raise UserError(
            f"{key}={name}: must be one of {allowed}, or the dotted path of a function{nearest(name, known)}"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}={name}: cannot be imported: {error}") from error
    if not callable(function):
        raise UserError(f"{key}={name}: must be a function, and is of type {type(function).__name__}")
    return function
