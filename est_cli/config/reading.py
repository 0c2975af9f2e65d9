"""Plain values → a `TrainConfig`: reads each section, then checks them against each other. Also a run's config.yaml."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from est_cli.config.checks import AUTO_MAX_STEPS, clashes
from est_cli.config.sections import GROW_KEYS, Count, SchedulerConfig, TrainConfig, option_that_gave
from est_cli.errors import UserError, nearest
from est_cli.plugins import named_function
from est_cli.schema import read
from est_cli.subnet.schedule import NAMED_SCHEDULES, Rates, StageSpec

CONFIG_FILE = "config.yaml"
"""The file of a run directory that holds the resolved config."""


def read_train_config(plain: Mapping[str, Any]) -> TrainConfig:
    """The typed config of a resolved, plain one.

    Raises UserError with every problem: unknown and missing keys, values out of range, and values that clash.
    """
    problems: list[str] = []
    # A Slurm job's id is a number, and also a name.
    plain = {key: str(v) if key in ("name", "run_id") and type(v) is int else v for key, v in plain.items()}
    hints = typing.get_type_hints(TrainConfig, include_extras=True)
    sections: dict[str, Any] = {}
    for name, kind in hints.items():
        if name in plain and name != "scheduler":
            sections[name] = read(kind, plain[name], name, problems)
        elif name not in plain and dataclasses.is_dataclass(kind):
            problems.append(f"{name}: is missing")
    problems += [f"{key}: there is no such key{nearest(str(key), hints)}" for key in plain if key not in hints]
    if "scheduler" in plain:
        sections["scheduler"] = _read_scheduler(plain["scheduler"], sections.get("sampling"), problems)
    problems += clashes(sections, _max_steps(plain.get("trainer")))
    if problems:
        raise UserError(*problems)
    return TrainConfig(**{**sections, "model": sections["model"].with_head_dim()})


def read_config_file(folder: Path, named: str) -> dict[str, Any]:
    """The plain config of the run in `folder`. `named` is the key or flag, with its value, that names the folder.

    Raises UserError if the file cannot be read or is something else.
    """
    import yaml  # which a GPU machine without Hydra, that only measures, need not have

    try:
        plain = yaml.safe_load((folder / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{named}: its {CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{named}: its {CONFIG_FILE} is not that of a run of est-train")
    return plain


def check_value(key: str, value: Any, problems: list[str]) -> None:
    """Append what is wrong with one value of a dotted key by itself. Ignores keys that have no type here."""
    *path, name = key.split(".")
    kind = typing.get_type_hints(_section(path), include_extras=True).get(name)
    if kind is not None and not dataclasses.is_dataclass(kind):
        read(kind, value, key, problems)


def what_replaced(key: str) -> str | None:
    """What to write in place of a dotted key that is gone; None for any other key."""
    *path, name = key.split(".")
    gone = getattr(_section(path), "GONE", {})
    return f"is gone; {gone[name][1]}" if name in gone else None


def _section(path: list[str]) -> Any:
    """The dataclass under a dotted path of TrainConfig; one without keys if there is none."""
    kind: Any = TrainConfig
    for part in path:
        kind = typing.get_type_hints(kind, include_extras=True).get(part)
        if not dataclasses.is_dataclass(kind):
            return object
    return kind


def _max_steps(trainer: Any) -> int | None:
    """trainer.max_steps, even if other keys of the section have problems."""
    problems: list[str] = []
    given = trainer.get("max_steps", "auto") if isinstance(trainer, Mapping) else None
    steps = read(Count, AUTO_MAX_STEPS if given == "auto" else given, "", problems)
    return None if problems else steps


def _read_scheduler(plain: Any, sampling: Any, problems: list[str]) -> SchedulerConfig | None:
    """The explicit stages of a scheduler section. `sampling` is None if that section has problems.

    `stages` is the list itself, or the name of a schedule (or the dotted path of a person's own function) that
    makes it, called as `function(rates, **the other keys)`.
    """
    if not isinstance(plain, Mapping):
        problems.append("scheduler: must be a mapping with stages")
        return None
    options = {key: value for key, value in plain.items() if key not in ("stages", *GROW_KEYS)}
    hints = typing.get_type_hints(SchedulerConfig, include_extras=True)
    grow = {key: read(hints[key], plain[key], f"scheduler.{key}", problems) for key in GROW_KEYS if key in plain}
    stages = plain.get("stages")
    if isinstance(stages, str):
        rates = Rates() if sampling is None else Rates(sampling.heads, sampling.mlp, sampling.layers)
        stages = _call_schedule(stages, rates, options, problems)
        if stages is None:
            return None
    elif sampling is None and isinstance(stages, list) and all(isinstance(stage, Mapping) for stage in stages):
        # Stages take their rates from `sampling`, whose problems are told there. The boundaries are still checked.
        stages = [{"end": stage.get("end")} for stage in stages]
    before = len(problems)
    specs = read(tuple[StageSpec, ...], stages, "scheduler.stages", problems)
    if len(problems) > before:
        problems[before:] = [_as_typed(problem, stages, options) for problem in problems[before:]]
        return None
    return SchedulerConfig(specs, **grow, options=options)


def _call_schedule(name: str, rates: Rates, options: dict, problems: list[str]) -> list | None:
    try:
        schedule = named_function(name, NAMED_SCHEDULES, "scheduler.stages")
        inspect.signature(schedule).bind(rates, **options)
        return [dataclasses.asdict(s) if isinstance(s, StageSpec) else s for s in schedule(rates, **options)]
    except UserError as error:
        problems += error.problems
    except (TypeError, ValueError) as error:
        problems.append(f"scheduler.stages={name}: {error}")
    return None


def _as_typed(problem: str, stages: Any, options: Mapping[str, Any]) -> str:
    """The problem of a stage, named by the option that the person set (stage2_end, grow_at) if one gave the value."""
    found = re.match(r"scheduler\.stages\[(\d+)\]\.(\w+)=", problem)
    if found is None:
        return problem
    index, key = int(found[1]), found[2]
    typed = option_that_gave(options, options, index, stages[index][key])
    return problem.replace(f"scheduler.stages[{index}].{key}", typed, 1) if typed else problem
