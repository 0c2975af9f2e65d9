"""Reading plain values into annotated types: what fits, what does not, and how that is said."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from est_cli.errors import nearest
from est_cli.schema import Within, read

Count = Annotated[int, Within(1)]
Share = Annotated[float, Within(0, 1, open_low=True)]
Boundary = Annotated[int, Within(1)] | Share


@dataclass(frozen=True)
class Inner:
    share: Share
    word: Literal["cosine", "linear"] = "cosine"


@dataclass(frozen=True)
class Outer:
    count: Count
    inner: Inner
    path: str | None = None


def reading(kind, value) -> tuple[object, list[str]]:
    problems: list[str] = []
    return read(kind, value, "key", problems), problems


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 0.5, 0.5),
        (bool, False, False),
        (str, "a", "a"),
        (Count, 1, 1),
        (Share, 1, 1.0),
        (str | None, None, None),
        (Literal["a", "b"], "b", "b"),
        (Count | Literal["auto"], "auto", "auto"),
        (Count | Literal["auto"], 4, 4),
        (tuple[float, float], [0, 0.5], (0.0, 0.5)),
        (tuple[int, ...], [], ()),
        (str | tuple[str, ...], ["a", "b"], ("a", "b")),
        (str | tuple[str, ...], "a", "a"),
        (Boundary, 1, 1),  # the first step, and 1.0 is the whole run
        (Boundary, 1.0, 1.0),
        (Outer, {"count": 2, "inner": {"share": 1}}, Outer(2, Inner(1.0))),  # defaults fill what is left out
    ],
)
def test_what_fits_is_read(kind, value, expected):
    result, problems = reading(kind, value)
    assert problems == []
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        (int, 1.0, "key=1.0: must be an integer"),
        (int, True, "key=true: must be an integer"),
        (float, True, "key=true: must be a number"),
        (float, math.nan, "key=nan: must be a number"),
        (float, math.inf, "key=inf: must be a number"),
        (bool, 1, "key=1: must be true or false"),
        (str, 5, "key=5: must be a text"),
        (str, None, "key=null: must be a text"),
        (Count, 0, "key=0: must be an integer of at least 1"),
        (Share, 0, "key=0: must be a number in (0, 1]"),
        (Share, 1.5, "key=1.5: must be a number in (0, 1]"),
        (Annotated[float, Within(0, open_low=True)], 0.0, "key=0.0: must be a number above 0"),
        (Boundary, 1.5, "key=1.5: must be an integer of at least 1 or a number in (0, 1]"),
        (Count | Literal["auto"], "aut", "must be an integer of at least 1 or auto; did you mean 'auto'?"),
        (Literal["cosine", "linear"], "cosin", "must be one of cosine, linear; did you mean 'cosine'?"),
        (Literal["cosine", "linear"], 3, "key=3: must be one of cosine, linear"),
        (tuple[float, float], [0.9], "key=[0.9]: must be a list of 2, each a number"),
        (tuple[float, float], 0.9, "key=0.9: must be a list of 2, each a number"),
        (tuple[Share, ...], [0.5, 2.0], "key[1]=2.0: must be a number in (0, 1]"),
        (str | tuple[str, ...], [1], "key[0]=1: must be a text"),
        (Inner, 3, "key=3: must be a mapping with share, word"),
        (Inner, {"share": 0.5, "wrod": "linear"}, "key.wrod: there is no such key; did you mean 'word'?"),
        (Inner, {}, "key.share: is missing; must be a number in (0, 1]"),
        (Count | Literal["auto"] | None, 0, "key=0: must be an integer of at least 1, auto or null"),
        (tuple[str, ...], 3, "key=3: must be a list, each a text"),
        (str, "a\0b", "must be a text"),
        (int, 10**20, f"key={10**20}: must be an integer, and of less than 20 digits"),
        (int, "x" * 500, f"key={'x' * 77}...: must be an integer"),
    ],
)
def test_what_does_not_fit_names_the_key_the_value_and_what_is_allowed(kind, value, problem):
    _, problems = reading(kind, value)
    assert len(problems) == 1
    assert problems[0].endswith(problem), problems[0]


@pytest.mark.parametrize(
    ("word", "hint"), [("heds", "; did you mean 'heads'?"), ("layer", "; did you mean 'layers'?"), ("zzz", "")]
)
def test_the_nearest_match_is_offered_only_where_there_is_one(word, hint):
    assert nearest(word, ["heads", "mlp", "layers"]) == hint
