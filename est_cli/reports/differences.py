"""What differs between the configs of runs, and which pairs of keys a sweep crossed."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from est_cli.reports.records import RunRecord
from est_cli.units import format_setting

SEED = "seed"
_STAGES = "scheduler.stages"
_ABSENT = object()
_NOT_SETTINGS = {"run_id", "name", "format", "data.cache_dir"}
_LARGEST_PAIRS = 3


@dataclass(frozen=True)
class Difference:
    """A config key whose values are not all equal."""

    key: str
    values: list[Any]
    """In every run; None in a run without the key."""
    also: list[str] = field(default_factory=list)
    """Other keys with the same values in every run, as `sampling.heads` and the stages that refer to it."""


def differences(runs: Sequence[RunRecord]) -> dict[str, Difference]:
    """The differences between the runs' configs, by key; keys that always agree are told once."""
    flat = [_flatten(run.config) for run in runs]
    if len({sum(key.startswith("scheduler.stages[") for key in config) for config in flat}) > 1:
        flat = [_with_stages_as_text(config, run) for config, run in zip(flat, runs, strict=True)]
        flat = _without_constant_schedule_keys(flat)
    keys = sorted(dict.fromkeys(key for config in flat for key in config), key=_plainest_first)
    differing: dict[tuple[str, ...], Difference] = {}
    for key in keys:
        values = [config.get(key, _ABSENT) for config in flat]
        identity = tuple("absent" if value is _ABSENT else json.dumps(value, default=str) for value in values)
        if len(set(identity)) == 1:
            continue
        if identity in differing:
            differing[identity].also.append(key)
        else:
            values = [None if value is _ABSENT else value for value in values]
            differing[identity] = Difference(key, values)
    return {difference.key: difference for difference in differing.values()}


def swept_pairs(differing: dict[str, Difference]) -> list[tuple[str, str]]:
    """Pairs of differing keys that the runs cross: at least 2×2 values, and half of the grid filled."""
    values = {key: difference.values for key, difference in differing.items()}
    keys = [key for key in values if key != SEED]
    if len(keys) == 1 and keys != [_STAGES] and SEED in values:
        keys = [*keys, SEED]
    pairs = [pair for pair in itertools.combinations(keys, 2) if _is_crossed(values[pair[0]], values[pair[1]])]
    pairs.sort(key=lambda pair: -len({*map(str, values[pair[0]])}) * len({*map(str, values[pair[1]])}))
    return pairs[:_LARGEST_PAIRS]


def _is_crossed(first: Sequence[Any], second: Sequence[Any]) -> bool:
    a, b = [str(value) for value in first], [str(value) for value in second]
    n_cells = len(set(zip(a, b, strict=True)))
    n_a, n_b = len(set(a)), len(set(b))
    return n_a >= 2 and n_b >= 2 and n_cells > max(n_a, n_b) and 2 * n_cells >= n_a * n_b


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path in _NOT_SETTINGS or path == "logger":
            continue
        if isinstance(value, dict):
            flat |= _flatten(value, f"{path}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                flat |= _flatten(item, f"{path}[{index}].")
        else:
            flat[path] = list(value) if isinstance(value, tuple) else value
    return flat


def _with_stages_as_text(config: dict[str, Any], run: RunRecord) -> dict[str, Any]:
    rest = {key: value for key, value in config.items() if not key.startswith("scheduler.stages[")}
    return rest | {_STAGES: stages_as_text(run)}


def _without_constant_schedule_keys(flat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without `scheduler.stage1_end` and the like where only some schedules have it: the stages as text tell it."""
    keys = {key for config in flat for key in config if key.startswith("scheduler.") and key != _STAGES}
    constant = {key for key in keys if len({repr(config[key]) for config in flat if key in config}) == 1}
    return [{key: value for key, value in config.items() if key not in constant} for config in flat]


def stages_as_text(run: RunRecord) -> str:
    """`0.5/0.5/0.5 to step 20, 1/1/1 to step 150`: the rates of heads, MLP and layers."""
    return ", ".join(
        "/".join(format_setting(rate) for rate in (stage.kept.heads, stage.kept.mlp, stage.kept.layers))
        + f" to step {stage.end}"
        for stage in run.stages
    )


def _plainest_first(key: str) -> tuple[bool, bool, str]:
    return key == SEED, key.startswith("scheduler.stages["), key
