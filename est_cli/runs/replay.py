"""est-train replay=FOLDER: runs a step that was not finite again, and says where that begins."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from est_cli import schema
from est_cli.composition.composer import compose
from est_cli.config import Format, TrainConfig, read_train_config
from est_cli.errors import UserError
from est_cli.training.device import available_device
from est_cli.training.nonfinite import STEP, Kept, Replay, read, replay

ALLOWED = ("format", "kernels", "trainer.device", "trainer.precision")
"""What may be asked for beside it: the rest is the run's own."""
_NAMES_SHOWN = 8


def run(value: str, config_name: str, arguments: argparse.Namespace) -> None:
    """Replay and print. Raises UserError for a folder of something else, and for overrides that have no meaning."""
    keys = [text.partition("=")[0] for text in arguments.overrides]
    strange = [key for key in keys if key not in ALLOWED] + ["-m"] * arguments.multirun
    if strange:
        raise UserError(f"replay={value}: goes with {', '.join(ALLOWED)} alone, and not with {', '.join(strange)}")
    composed, _ = compose(config_name, arguments)
    problems: list[str] = []
    form = schema.read(Format, composed["format"], "format", problems)
    if problems:
        raise UserError(*problems)
    folder = Path(value).expanduser()
    folder = folder.parent if folder.is_file() else folder
    try:
        config = _config(folder, dict.fromkeys(keys, composed))
        kept = read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"replay={value}: must be a folder that a run has left below nonfinite/ ({type(error).__name__}: {error})"
        ) from error
    device = available_device(config.trainer, config.kernels).kind
    _print(kept, config, replay(kept, config, torch.device(device)), folder, device, form)


def _config(folder: Path, given: dict[str, dict[str, Any]]) -> TrainConfig:
    """The run's config, with what was asked for in its place."""
    plain = json.loads((folder / STEP).read_text())["config"]
    for key, composed in given.items():
        section, _, name = key.rpartition(".")
        source, target = (composed[section], plain[section]) if section else (composed, plain)
        target[name] = source[name]
    if plain["trainer"]["device"] == "cuda" and "trainer.device" not in given and not torch.cuda.is_available():
        plain["trainer"]["device"] = "cpu"
    if plain["trainer"]["precision"] == "auto":
        plain["trainer"]["precision"] = "fp32"
    plain["trainer"] |= {"devices": 1, "strategy": "single", "shard": False, "shard_size": "auto"}
    return read_train_config(plain)


def _print(kept: Kept, config: TrainConfig, seen: Replay, folder: Path, device: str, format: str) -> None:
    facts = {"step": kept.step, "stage": kept.stage, **dataclasses.asdict(seen)}
    if format == "json":
        print(json.dumps(facts))
        return
    losses = ", ".join("not finite" if loss is None else f"{loss:.6g}" for loss in seen.losses)
    print(f"step {kept.step}, stage {kept.stage}, of {folder}, on {device} in {config.trainer.precision}")
    print(f"  loss of each micro-batch: {losses}")
    print(f"  gradient norm: {'not finite' if seen.grad_norm is None else f'{seen.grad_norm:.6g}'}")
    print(f"  first module whose output is not finite: {seen.first or 'none'}")
    print(f"  weights that are not finite, before the step: {_some(seen.weights)}")
    print(f"  gradients that are not finite: {_some(seen.gradients)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more if names else "none"
