"""What may differ between a run's config and that of the command that continues it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

HARMLESS = (
    "format",
    "logger",
    "checkpoint",
    "run_id",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.eval_tokens",
    "trainer.checkpoint_every",
    "trainer.save_final",
    "trainer.peak_flops",
    "trainer.threads",
    "trainer.on_nonfinite",
    "trainer.profile",
    "trainer.collective_timeout_s",
    "trainer.strategy",
    "trainer.shard_size",
    "data.cache_dir",
    "data.num_workers",
    "data.on_change",
    "data.on_broken",
    "name",
)
"""Keys, and whole sections, that may change when a run continues. Most do not reach the weights.

`trainer.threads`, `strategy` and `shard_size` can change the rounding of sums. `data.on_change`, `data.on_broken` and
`trainer.on_nonfinite` say what to do about another text, a broken row, or a step that is not finite.
"""

MAX_STEPS = "trainer.max_steps"
BATCH = ("trainer.devices", "trainer.batch_size", "trainer.grad_accum")
"""Keys that may change as long as their product, the sequences of a step, does not."""


@dataclass(frozen=True)
class Change:
    """A key whose value differs between two plain configs."""

    key: str
    old: Any
    new: Any
    problem: str | None
    """Why it may not differ; None if it may."""

    def __str__(self) -> str:
        return f"{self.key}: was {self.old}, is {self.new}"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every key that differs between the plain config of a run and a new one."""
    return [Change(*difference, _problem(*difference, old, new)) for difference in _differences(old, new)]


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def _problem(key: str, old: Any, new: Any, saved: dict[str, Any], config: dict[str, Any]) -> str | None:
    if is_below(key, HARMLESS):
        return None
    if key in BATCH:
        return _batch_problem(saved["trainer"], config["trainer"])
    if key != MAX_STEPS:
        return "decides the weights"
    if new < old:
        return "may grow only"
    if fractions := ", ".join(f"{name}={value}" for name, value in _fractions(config)):
        return f"may grow only where boundaries, warmup and decay are given in steps, and not as {fractions}"
    return None


def is_below(key: str, sections: Sequence[str]) -> bool:
    """Whether a key or a config group is one of `sections`, or lies in one."""
    return any(key == section or key.startswith((f"{section}.", f"{section}/")) for section in sections)


def _fractions(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys whose meaning depends on the number of steps, so a longer run would have trained differently so far."""
    for number, stage in enumerate(config["scheduler"]["stages"]):
        if isinstance(stage["end"], float):
            yield f"scheduler.stages[{number}].end", stage["end"]
    optimizer = config["optimizer"]
    if isinstance(optimizer["warmup"], float):
        yield "optimizer.warmup", optimizer["warmup"]
    if optimizer["decay"] == "wsd":
        # Its decay counts back from the end, also when it is given in steps.
        yield "optimizer.decay", "wsd"
    elif optimizer["decay"] != "none" and not isinstance(optimizer["decay_steps"], int):
        yield "optimizer.decay_steps", "null" if optimizer["decay_steps"] is None else optimizer["decay_steps"]


def _batch_problem(saved: dict[str, Any], trainer: dict[str, Any]) -> str | None:
    """How to keep the number of sequences in a step; None if the new config keeps it."""
    keys = [key.removeprefix("trainer.") for key in BATCH]
    sequences, devices = math.prod(saved[key] for key in keys), trainer["devices"]
    if sequences == math.prod(trainer[key] for key in keys):
        return None
    if sequences % devices:
        possible = ", ".join(str(n) for n in range(1, sequences + 1) if sequences % n == 0)
        return f"a step has {sequences} sequences, which trainer.devices must divide: {possible}"
    share = sequences // devices
    batch_size = max(n for n in range(1, min(share, saved["batch_size"]) + 1) if share % n == 0)
    return (
        f"a step's {sequences} sequences are kept on trainer.devices={devices} by trainer.batch_size={batch_size} "
        f"trainer.grad_accum={share // batch_size}"
    )
