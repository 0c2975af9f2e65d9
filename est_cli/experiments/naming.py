"""What a sweep's overrides ask for, and the folder names made from them, so the same command finds its jobs again."""

import hashlib
import json
import re
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from est_cli.composition.typed_text import parse

_LONGEST_NAME = 100
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9.]+|[A-Za-z0-9._]+|[A-Za-z0-9.-]+")
"""Values that a name shows as they are; `_` and `-` together could be read as the next key."""


class SweepRequest:
    """What a sweep was asked for: overrides of the command line, and the keys that the config sweeps by itself."""

    def __init__(self, config: DictConfig):
        typed = map(parse, config.hydra.overrides.task)
        self.overrides: dict[str, Override] = {o.get_key_element().lstrip("+~"): o for o in typed}
        """By key; the last one if a key is given twice, as Hydra takes it."""
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        self.params: dict[str, Any] = {k: v for k, v in params.items() if k.lstrip("+~") not in self.overrides}
        """hydra.sweeper.params without the keys that the command line sets."""
        self.arms = None if "arm" in self.overrides else OmegaConf.select(config, "arms")
        """The arms of a comparison; None if the sweep is another one. `+arm=...` on the command line replaces it."""

    @property
    def swept(self) -> set[str]:
        """The keys in which the jobs differ."""
        keys = {key for key, override in self.overrides.items() if override.is_sweep_override()}
        keys |= {key.lstrip("+~") for key in self.params}
        return keys if self.arms is None else keys | {"arm"}


def sweep_name(_root_: DictConfig) -> str:
    """`sweep-stage1_end-seed-1f0c93aa`: the swept keys, and a digest of all overrides in any order."""
    asked = SweepRequest(_root_)
    overrides = [*(f"{key}={value}" for key, value in asked.params.items()), *_root_.hydra.overrides.task]
    if asked.arms is not None and "arms" not in asked.overrides:
        overrides.append(f"arms={list(asked.arms)}")
    overrides.sort()
    config_name = OmegaConf.select(_root_, "hydra.job.config_name")
    if config_name not in (None, "train"):
        overrides.append(f"--config-name={config_name}")
    keys = "-".join(_safe(key.rpartition(".")[2]) for key in sorted(asked.swept))
    return "-".join(filter(None, ("sweep", keys[:60].strip("-"), _digest(overrides))))


def job_name(_root_: DictConfig) -> str:
    """`stage1_end-0.1_seed-0`: what this job does not share with the others. Unique; only [A-Za-z0-9._-]."""
    fixed = set(_root_.hydra.job.config.override_dirname.exclude_keys)
    written = {key: _unquoted(o) for key, o in sorted(SweepRequest(_root_).overrides.items()) if key not in fixed}
    name = "_".join(f"{_safe(key.rpartition('.')[2])}-{_safe(value)}" for key, value in written.items()) or "job"
    if len(name) <= _LONGEST_NAME and all(map(_PLAIN_VALUE.fullmatch, written.values())):
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{_digest([f'{key}={value}' for key, value in written.items()])}"


OmegaConf.register_new_resolver("est.sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("est.job_name", job_name, replace=True)


def _unquoted(override: Override) -> str:
    """The value as it was typed, without quotes that only say that it is a text."""
    written, value = override.input_line.partition("=")[2], override.value()
    return value if isinstance(value, str) and written == f"'{value}'" and _PLAIN_VALUE.fullmatch(value) else written


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
