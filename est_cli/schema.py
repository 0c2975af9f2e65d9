"""Reads plain values (dict, list, str, numbers) into annotated types, and collects every problem.

`Annotated[int, Within(1)]` is checked, and described in error messages, from the same words. Integers and floats are
kept apart; booleans are neither.

pydantic 2 was tried in its place. With our messages (the key that was typed, the value, what is allowed, the nearest
match) the reader had 155 lines and still failed three tests of messages; reading the default config took 0.48 s from a
cold start instead of 0.28 s (medians of 9); and est_cli.benchmark, which runs with torch and numpy only, would have
needed a second reader.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from est_cli.errors import nearest

_LARGEST = 2**64
"""No count is larger, and a product of two such numbers still is a float."""
_UNIONS = (typing.Union, types.UnionType)
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


@dataclasses.dataclass(frozen=True)
class Within:
    """An interval for a number, as `Annotated` metadata."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'of at least'} {self.low:g}"
        return f"in {'(['[not self.open_low]}{self.low:g}, {self.high:g}{')]'[not self.open_high]}"


def describe(kind: Any) -> str:
    """The allowed values of a type, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return f"{describe(arguments[0])} {arguments[1]}"
    if origin in _UNIONS:
        *words, last = map(describe, arguments)
        return f"{', '.join(words)} or {last}"
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(arguments)
    if origin is tuple:
        length = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{length}, each {describe(arguments[0])}"
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(kind))}"
    return _WORDS[kind]


def read(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as `kind`. Appends what does not fit to `problems`, under its dotted `path`, and then returns None."""
    part = _alternative(kind, value)
    origin, arguments = typing.get_origin(part), typing.get_args(part)
    if dataclasses.is_dataclass(part) and isinstance(value, Mapping):
        return _read_fields(part, value, path, problems)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value, strict=True))
            return tuple(read(kind, item, f"{path}[{i}]", problems) for i, (kind, item) in items)
    try:
        return _fitting(kind, value)
    except ValueError:
        problems.append(f"{path}={_show(value)}: must be {describe(kind)}{_hint(kind, value)}")
        return None


def _alternative(kind: Any, value: Any) -> Any:
    """The alternative of a union that a list or a mapping is meant for, whose own problems say more; else `kind`."""
    for alternative in typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else ():
        of_list = typing.get_origin(alternative) is tuple and isinstance(value, list | tuple)
        if of_list or (dataclasses.is_dataclass(alternative) and isinstance(value, Mapping)):
            return alternative
    return kind


def _read_fields(kind: Any, value: Mapping, path: str, problems: list[str]) -> Any:
    """A dataclass. Its GONE names former keys, each with the only value that is still read, and what to write now."""
    before, prefix, found = len(problems), f"{path}." if path else "", {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints, gone = typing.get_type_hints(kind, include_extras=True), getattr(kind, "GONE", {})
    for key in [key for key in value if key not in fields]:
        if key not in gone:
            problems.append(f"{prefix}{key}: there is no such key{nearest(str(key), fields)}")
        elif value[key] != gone[key][0]:
            problems.append(f"{prefix}{key}={_show(value[key])}: is gone; {gone[key][1]}")
    for name, field in fields.items():
        if name in value:
            found[name] = read(hints[name], value[name], f"{prefix}{name}", problems)
        elif field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name}: is missing; must be {describe(hints[name])}")
    return kind(**found) if len(problems) == before else None


def _fitting(kind: Any, value: Any) -> Any:
    """`value` as a type without parts. Raises ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        for alternative in arguments:
            with contextlib.suppress(ValueError):
                return _fitting(alternative, value)
    elif origin is typing.Annotated:
        number = _fitting(arguments[0], value)
        if number in arguments[1]:
            return number
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif _is_huge(value):
        pass
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind is not float and type(value) is kind and not (kind is str and "\0" in value):  # no file name holds a NUL
        return value
    raise ValueError


def _hint(kind: Any, value: Any) -> str:
    """The nearest of the words that `kind` allows, or why a number is none."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    words = [word for each in kinds if typing.get_origin(each) is Literal for word in typing.get_args(each)]
    return ", and of less than 20 digits" if _is_huge(value) and not words else nearest(str(value), words)


def _is_huge(value: Any) -> bool:
    return type(value) is int and abs(value) > _LARGEST


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
