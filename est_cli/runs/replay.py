"""est-train replay=FOLDER: runs a step that was not finite again, and names the first module that is not finite."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from est_cli.composition.composer import Composer, plain
from est_cli.config import TrainConfig, read_train_config
from est_cli.errors import UserError
from est_cli.training.device import available_device
from est_cli.training.nonfinite import STEP, Kept, Replay, read, replay

ALLOWED = ("format", "kernels", "trainer.device", "trainer.precision")
"""The keys that may be given with replay=; all others have the run's values."""
_NAMES_SHOWN = 8


def run(value: str, composer: Composer) -> None:
    """Replay and print. Raises UserError for a folder of something else, and for overrides that have no meaning."""
    arguments = composer.arguments
    keys = [text.partition("=")[0] for text in arguments.overrides]
    strange = [key for key in keys if key not in ALLOWED] + ["-m"] * arguments.multirun
    if strange:
        raise UserError(f"replay={value}: goes only with {', '.join(ALLOWED)}, and not with {', '.join(strange)}")
    given = read_train_config(plain(composer.compose()))
    folder = Path(value).expanduser()
    folder = folder.parent if folder.is_file() else folder
    try:
        config = _config(folder, given, keys)
        kept = read(folder)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"replay={value}: must be a folder that a run has left below nonfinite/ ({type(error).__name__}: {error})"
        ) from error
    device = available_device(config.trainer, config.kernels).kind
    _print(kept, config, replay(kept, config, torch.device(device)), folder, device)


def _config(folder: Path, given: TrainConfig, keys: Sequence[str]) -> TrainConfig:
    """The run's config for one process, with the values of `keys` that were given."""
    config = read_train_config(json.loads((folder / STEP).read_text())["config"])
    trainer = {"devices": 1, "strategy": "single", "shard_size": "auto"}
    if config.trainer.device == "cuda" and not torch.cuda.is_available():
        trainer["device"] = "cpu"
    trainer |= {key: getattr(given.trainer, key) for key in ("device", "precision") if f"trainer.{key}" in keys}
    if trainer.get("precision") == "auto":
        trainer["precision"] = "fp32"
    changed = {"kernels": given.kernels} if "kernels" in keys else {}
    trainer = dataclasses.replace(config.trainer, **trainer)
    return dataclasses.replace(config, trainer=trainer, format=given.format, **changed)


def _print(kept: Kept, config: TrainConfig, seen: Replay, folder: Path, device: str) -> None:
    facts = {"step": kept.step, "stage": kept.stage, **dataclasses.asdict(seen)}
    if config.format == "json":
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
