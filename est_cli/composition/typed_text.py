"""Names stay what was typed: Hydra reads 47_113 as the number 47113, 1234e56 as a float, and a#b.txt not at all."""

import contextlib
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from est_cli.config import TrainConfig

_OF_COMMANDS = ("run", "runs", "out", "prompt", "tasks", "tasks_dir")
_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name")
_NEVER_NULL = ("name", "run_id")
"""Keys whose null has no meaning: there it is a name too."""

_WORD = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\$\{[^}]*\}|[^\s,\[\]()'"])[^,\[\]()'"]*""")
"""A bare or quoted element of a list or a sweep."""


def parse(override: str, loader: ConfigLoader | None = None) -> Override:
    """Raises HydraException. `loader` lets `glob(…)` list the options of a group."""
    return OverridesParser.create(loader).parse_overrides([override])[0]


def typed_keys(overrides: list[str]) -> Iterator[str]:
    """The key of every override, in order. Composing reports those that cannot be parsed."""
    for text in overrides:
        with contextlib.suppress(HydraException):
            yield parse(text).key_or_group.lstrip("+~")


@functools.cache
def text_keys() -> frozenset[str]:
    """Dotted keys whose values are texts and never numbers."""
    return frozenset([*_text_fields(TrainConfig, ""), *_OF_COMMANDS, *_OF_HYDRA])


def as_typed(overrides: list[str], multirun: bool = False) -> list[str]:
    """The overrides, in which every value of a text key that Hydra would not read as that text is quoted."""
    return [_as_typed(text, multirun) for text in overrides]


def _as_typed(override: str, multirun: bool) -> str:
    typed_key, equals, value = override.partition("=")
    key = typed_key.strip().lstrip("+")
    if not equals or key not in text_keys() or not value.strip():
        return override
    readable, listed = _is_readable(override), multirun or value.lstrip().startswith("[")
    choice = re.fullmatch(r"\s*choice\((.*)\)\s*", value)
    if readable and not choice and re.match(r"\s*\w+\(", value):
        return override
    # Hydra forgets the quotes of a choice's elements.
    elements = choice[1] if readable and choice else value
    by_word = f"{typed_key}={_WORD.sub(lambda word: _quoted_word(key, word[0]), elements)}"
    return by_word if readable or (listed and _is_readable(by_word)) else f"{typed_key}={quoted(value)}"


def quoted(text: str) -> str:
    """`text` as Hydra's grammar writes it: it reads as these characters."""
    return QuotedString(text, Quote.single).with_quotes()


def _quoted_word(key: str, word: str) -> str:
    try:
        value = parse(f"{key}={word}").value()
    except HydraException:
        return quoted(word)
    is_text = not isinstance(value, int | float) and (value is not None or key not in _NEVER_NULL)
    return word if is_text else quoted(word.strip())


def _is_readable(override: str) -> bool:
    try:
        parse(override)
    except HydraException:
        return False
    return True


def _text_fields(kind: Any, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _text_fields(hint, f"{prefix}{name}.")
        elif _holds_text(hint):
            yield f"{prefix}{name}"


def _holds_text(hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not types.NoneType]
        return bool(kinds) and all(map(_holds_text, kinds))
    return hint is str or (typing.get_origin(hint) is tuple and arguments[0] is str)
