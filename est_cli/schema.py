"""Reads plain values (dict, list, str, numbers) into annotated types, and collects every problem.

`Annotated[int, Within(1)]` is checked, and described in error messages, from the same words. Integers and floats are
kept apart; booleans are neither.

pydantic 2 was tried in its place. With our messages (the key that was typed, the value, what is allowed, the nearest
match) the reader had 155 lines instead of 166 and still failed three tests of messages; reading the default config took
0.48 s from a cold start instead of 0.28 s (medians of 9); and est_cli.benchmark, which runs with torch and numpy only,
would have needed a second reader.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from est_cli.errors import nearest

_LARGEST = 2**64
"""No count is larger, and a product of two such numbers still is a float."""


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
    if origin in (typing.Union, types.UnionType):
        words = [describe(argument) for argument in arguments]
        return ", ".join(words[:-1]) + " or " + words[-1]
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each {describe(arguments[0])}"
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(kind))}"
    return {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "a mapping",
        types.NoneType: "null",
    }[origin or kind]


def read(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as `kind`. Appends what does not fit to `problems`, under its dotted `path`, and then returns None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, path, problems)
    if origin is typing.Annotated:
        return _read_annotated(arguments[0], arguments[1], value, path, problems)
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, kind, value, path, problems)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        hint = nearest(str(value), map(str, arguments))
        problems.append(f"{path}={_show(value)}: must be {describe(kind)}{hint}")
        return None
    if origin is tuple:
        return _read_tuple(arguments, kind, value, path, problems)
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    plain = origin or kind
    if type(value) is int and abs(value) > _LARGEST:
        problems.append(f"{path}={_show(value)}: must be {describe(kind)}, and of less than 20 digits")
        return None
    if plain is float and type(value) is int:
        value = float(value)
    fits = type(value) is plain
    if fits and plain is float:
        fits = math.isfinite(value)
    elif fits and plain is str:
        fits = "\0" not in value  # no file name may hold one
    if fits:
        return value
    problems.append(f"{path}={_show(value)}: must be {describe(kind)}")
    return None


def _read_dataclass(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path}={_show(value)}: must be {describe(kind)}")
        return None
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind, include_extras=True)
    before = len(problems)
    for key in value:
        if key not in fields:
            problems.append(f"{_join(path, str(key))}: there is no such key{nearest(str(key), fields)}")
    read_fields = {}
    for name, field in fields.items():
        if name in value:
            read_fields[name] = read(hints[name], value[name], _join(path, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, name)}: is missing; must be {describe(hints[name])}")
    return kind(**read_fields) if len(problems) == before else None


def _read_annotated(base: Any, interval: Within, value: Any, path: str, problems: list[str]) -> Any:
    before = len(problems)
    number = read(base, value, path, problems)
    if len(problems) > before:
        problems[-1] += f" {interval}"
    elif number not in interval:
        problems.append(f"{path}={_show(value)}: must be {describe(base)} {interval}")
    return number


def _read_union(kinds: Sequence[Any], union: Any, value: Any, path: str, problems: list[str]) -> Any:
    # A list can only be meant for one alternative, whose own problems say more.
    structured = [kind for kind in kinds if typing.get_origin(kind) is tuple] if isinstance(value, list) else []
    for kind in structured or kinds:
        own: list[str] = []
        result = read(kind, value, path, own)
        if not own:
            return result
    if structured:
        problems += own
    else:
        words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
        hint = nearest(value, words) if isinstance(value, str) else ""
        problems.append(f"{path}={_show(value)}: must be {describe(union)}{hint}")
    return None


def _read_tuple(arguments: tuple, kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    fixed = arguments[-1] is not Ellipsis
    if not isinstance(value, list | tuple) or (fixed and len(value) != len(arguments)):
        problems.append(f"{path}={_show(value)}: must be {describe(kind)}")
        return None
    kinds = arguments if fixed else [arguments[0]] * len(value)
    return tuple(read(k, v, f"{path}[{i}]", problems) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
