"""A step whose loss or gradient is not finite: kept in a folder, and run again from there.

nonfinite/step-00000743/
  model.safetensors  the weights before the step
  batch.safetensors  its token windows [n, T + 1], in the order of ranks and micro-batches
  step.json          the step, its stage and plan, what was seen, the run's config
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from est_cli.config import TrainConfig, as_plain
from est_cli.files import write_json
from est_cli.kernels.dispatch import kernels_for
from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import Plan, stage_subnetwork
from est_cli.training.checkpoint import MODEL
from est_cli.training.files import write_tensors
from est_cli.training.steps import NonFinite
from est_cli.training.subnetwork import DTYPES, MaskedSubnetwork, PackedSubnetwork, name_in_master

BATCH, STEP = "batch.safetensors", "step.json"


def keep_step(
    parent: Path, failed: NonFinite, weights: Mapping[str, Tensor], windows: np.ndarray, config: TrainConfig
) -> Path:
    """Write the folder of a step; windows [n, T + 1]. Raises OSError if the disk does not take it."""
    step = failed.step
    folder = parent / f"step-{step.number:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_tensors(weights, folder / MODEL)
    write_tensors({"windows": torch.from_numpy(windows)}, folder / BATCH)
    content = {
        "step": step.number,
        "seen": str(failed),
        "loss": _finite(step.loss),
        "grad_norm": _finite(step.grad_norm),
        "stage": step.stage.number,
        "plan": step.plan.as_dict(),
        "config": as_plain(config),
    }
    write_json(folder / STEP, content)
    return folder


@dataclass(frozen=True)
class Kept:
    """A step that was kept, read back."""

    step: int
    stage: int
    plan: Plan
    windows: Tensor
    weights: Mapping[str, Tensor]


def read(folder: Path) -> Kept:
    """What `keep_step` wrote. Raises OSError, ValueError or KeyError for anything else."""
    content = json.loads((folder / STEP).read_text())
    # An empty list has no type of its own.
    units = {name: np.array(content["plan"][name], np.int64) for name in ("layers", "heads", "kv_heads", "neurons")}
    plan = Plan(**units, scales=np.array(content["plan"]["scales"], float).reshape(-1, 2))
    windows, weights = load_file(folder / BATCH)["windows"], load_file(folder / MODEL)
    return Kept(content["step"], content["stage"], plan, windows, weights)


@dataclass(frozen=True)
class Replay:
    """What running the step again showed; None stands for a number that is not finite."""

    losses: list[float | None]
    """One a micro-batch."""
    grad_norm: float | None
    first: str | None
    """The first module, in the numbering of the full model, whose output is not finite."""
    weights: list[str]
    """Parameters that held such values before the step."""
    gradients: list[str]
    """Parameters whose gradient does."""


def replay(kept: Kept, config: TrainConfig, device: torch.device) -> Replay:
    """Run the step again on `device`, micro-batch by micro-batch, in the precision of `config`; no update."""
    model = Transformer(config.model, device, kernels=kernels_for(config.kernels, device))
    model.load_state_dict(kept.weights)
    shape = stage_subnetwork(config.model, config.sampling, config.stages[kept.stage - 1])
    is_masked = config.kernels == "masked"
    subnet = (MaskedSubnetwork if is_masked else PackedSubnetwork)(model, shape, DTYPES[config.trainer.precision])
    subnet.load(kept.plan)
    micro_batches = kept.windows.to(device).split(config.trainer.batch_size)
    losses, first = [], []
    for name, module in subnet.module.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            name_in_full = name if is_masked else name_in_master(name, kept.plan)
            module.register_forward_hook(_watch(name_in_full, first))
    for batch in micro_batches:
        loss = subnet.loss(batch[:, :-1], batch[:, 1:]) / len(micro_batches)
        loss.backward()
        losses.append(_finite(loss.item() * len(micro_batches)))
    gradients = {update.name: update.gradient for update in subnet.updates()}
    norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    return Replay(losses, _finite(norm), next(iter(first), None), _broken(kept.weights), _broken(gradients))


def _watch(name: str, found: list[str]):
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not found and not output.isfinite().all():
            found.append(name)

    return hook


def _broken(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
