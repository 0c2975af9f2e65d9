"""Whatever a person types: a config that can be trained, or one UserError. Nothing else is raised."""

import argparse
import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from est_cli.composition.composer import compose
from est_cli.config import TrainConfig, as_plain, auto, read_train_config
from est_cli.errors import UserError
from est_cli.subnet.flops import config_ledger


def composed(*overrides: str) -> dict[str, Any]:
    return compose("train", argparse.Namespace(overrides=list(overrides), config_name=None, config_dir=None))[0]


PHASES = (Phase.explicit, Phase.generate)
"""Shrinking a failure takes minutes and tells little more."""
BASE = composed("model=micro", "run_id=fixed")


def paths(node: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """Every place of a config tree, sections and list items too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([0, -1, 1, 10**6, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.5, 1.0, 1e-320, 1e308, -0.0]),
)
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "auto", "null", "true", "../x", "/", "a\0b", "${model}", "os.system", "__import__", "text",
                     "hf", "x" * 5000, "three_stage", "\ud800", "random", "builtins.eval", "1e5"]),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=4,
)
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(sorted(paths(BASE), key=str)), st.sampled_from(["set", "delete", "add"]), VALUES),
    min_size=1,
    max_size=3,
)


def mutated(mutations: list[tuple[tuple, str, Any]]) -> dict[str, Any]:
    tree = copy.deepcopy(BASE)
    for path, how, value in mutations:
        node = tree
        try:
            for key in path[:-1]:
                node = node[key]
            if how == "set":
                node[path[-1]] = copy.deepcopy(value)
            elif how == "delete":
                del node[path[-1]]
            else:
                node[path[-1]][str(value)[:20]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier mutation has removed the place
    return tree


def accept(plain: Any) -> TrainConfig | None:
    """The config with its sizes chosen, or None where it is refused as it should be."""
    try:
        config, said = auto.choose(read_train_config(plain), auto.Device("cpu"))
        stages = config.stages
    except UserError as error:
        assert error.problems and all(isinstance(line, str) and line for line in error.problems)
        return None
    assert stages[-1].end == config.trainer.max_steps
    assert all(isinstance(line, str) for line in said)
    assert math.isfinite(config_ledger(config).full.total)
    return config


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, phases=PHASES
)
@given(MUTATIONS)
@example([(("trainer", "max_steps"), "set", 10**400)])
@example([(("model", "d_model"), "set", 10**400)])
@example([(("scheduler",), "set", {"stages": "builtins.eval", "code": "1"})])
@example([(("scheduler", "stages"), "set", "os.system")])
@example([(("run_id",), "set", "../../elsewhere")])
def test_a_config_is_read_or_refused(mutations):
    plain = mutated(mutations)
    before = copy.deepcopy(plain)
    config = accept(plain)
    assert repr(plain) == repr(before), "reading does not change what is read"
    if config is not None:
        assert read_train_config(as_plain(config)) == config


@settings(max_examples=60, deadline=None, derandomize=True, phases=PHASES)
@given(VALUES)
def test_a_tree_of_anything_is_refused(value):
    accept(value if isinstance(value, dict) else {"model": value})


KEYS = [".".join(map(str, path)) for path in paths(BASE) if not any(isinstance(key, int) for key in path)]
TYPED = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "[", "{", "}", "'", '"', "${", "${x}", "${oc.env:HOME}", "\\", "a b", "=", "[1,2", "{a:1}",
                     "null", "1_0", "0x10", "nan", "é", "\ud800", "${est.run_id:}", "???", "choice(1,2)"]),
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, phases=PHASES)
@given(st.sampled_from([*KEYS, "", "~", "+a", "++trainer.x", "~model", "model@x", "/model", "hydra.run.dir"]), TYPED)
@example("model", "gpt2@x")
@example("trainer.max_steps", "choice(1,2)")
@example("trainer.max_steps", "???")
@example("run_id", "\ud800")
def test_an_override_is_composed_or_refused(key, value):
    try:
        plain = composed("model=micro", f"{key}={value}")
    except UserError as error:
        assert error.problems
        return
    accept(plain)


@pytest.mark.parametrize("text", ["", "=", "==", "a", "~", "+", "-m", "\0", "model", "model=", "[", "💥", "~model"])
def test_a_word_that_is_no_override_is_refused_or_composed(text):
    try:
        composed(text)
    except UserError as error:
        assert error.problems
