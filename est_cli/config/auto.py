"""Chosen values: every `auto` becomes a number that suits the device, and the choices worth knowing are reported."""

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Any

from est_cli.config.checks import AUTO_MAX_STEPS
from est_cli.config.sections import DataConfig, ModelConfig, TrainConfig, TrainerConfig
from est_cli.errors import UserError
from est_cli.subnet.flops import config_ledger, training_flops
from est_cli.subnet.memory import checkpoint_bytes
from est_cli.subnet.plan import stage_subnetworks

CPU_STEP_FLOPS = 4e11
"""About four seconds of two CPU cores."""
CPU_SEQ_LEN = 256
CPU_TOKENS = 2048
CUDA_TOKENS = 16384
LARGE_CHECKPOINT_BYTES = 4e9
CUDA_FLOPS_PER_S = 4e14
"""FLOP/s of a fast GPU. On a slower one a step takes longer, and compiling saves more."""
COMPILE_SAVES = 0.1
"""Share of a step's time that compiled blocks save on a GPU."""
COMPILE_S = 60.0
"""Seconds to compile one size of block, forward and backward. This and the two above are assumed, not measured."""
EVALUATIONS = 10
FEWEST_STEPS_BETWEEN_EVALUATIONS = 10
MOST_LISTED = 1024
_TOLD = ("seq_len", "batch_size", "max_steps", "eval_tokens", "precision", "compile")
GPUS_OF_A_MACHINE = 8
"""Assumed where no machine can be asked: by est-plan."""


@dataclasses.dataclass(frozen=True)
class Device:
    """The part of the machine that sizes depend on."""

    kind: str
    """cpu or cuda"""
    processes: int = 1
    per_machine: int = 1
    has_compiler: bool = True
    """Whether torch.compile finds what it needs."""


def count_gpus() -> int:
    """The NVIDIA GPUs that this machine shows, found without importing torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or int(shutil.which("nvidia-smi") is not None)


def expected_device(config: TrainConfig) -> Device:
    """The device that this machine would train on, judged without torch."""
    kind, devices, gpus = config.trainer.device, config.trainer.devices, count_gpus()
    if kind == "auto":
        kind = "cuda" if gpus else "cpu"
    if devices == "auto":
        devices = max(1, gpus) if kind == "cuda" else 1
    return Device(kind, devices, math.gcd(devices, GPUS_OF_A_MACHINE))


def choose(config: TrainConfig, device: Device) -> tuple[TrainConfig, list[str]]:
    """`config` with a number for every `auto`, and one line for each choice worth reporting.

    Raises UserError if the devices cannot share the model.
    """
    model, data, trainer = config.model, config.data, config.trainer
    cpu = device.kind == "cpu"
    chosen: dict[str, Any] = {}

    def pick(section: DataConfig | TrainerConfig, key: str, value: Any) -> Any:
        given = getattr(section, key)
        return chosen.setdefault(key, value) if given == "auto" else given

    seq_len = pick(data, "seq_len", min(model.max_seq_len, CPU_SEQ_LEN) if cpu else model.max_seq_len)
    per_token = training_flops(model, seq_len, 1).total
    tokens = min(CPU_TOKENS, CPU_STEP_FLOPS / per_token) if cpu else CUDA_TOKENS
    batch_size = pick(trainer, "batch_size", max(1, int(tokens // seq_len)))
    grad_accum = pick(trainer, "grad_accum", 1)
    max_steps = pick(trainer, "max_steps", AUTO_MAX_STEPS)
    processes = 1 if trainer.strategy == "single" else device.processes
    step_tokens = batch_size * grad_accum * processes * seq_len
    weights, full = checkpoint_bytes(model)
    eval_every = pick(trainer, "eval_every", max(FEWEST_STEPS_BETWEEN_EVALUATIONS, max_steps // EVALUATIONS))
    # A forward pass is a third of a step, and stage 1 steps can cost a quarter: 6 batches are at most 8 of them.
    pick(trainer, "eval_tokens", max(seq_len, 6 * step_tokens if cpu else max(6 * step_tokens, 1 << 20)))
    pick(trainer, "checkpoint_every", eval_every if full <= LARGE_CHECKPOINT_BYTES else 0)
    fits = "full" if full <= LARGE_CHECKPOINT_BYTES else "weights" if weights <= LARGE_CHECKPOINT_BYTES else "none"
    pick(trainer, "save_final", fits)
    pick(trainer, "precision", "fp32" if cpu else "bf16")
    pick(trainer, "device", device.kind)
    shard_size = _shard_size(model, trainer, processes, device.per_machine)
    numbers = {key: value for key, value in chosen.items() if key != "seq_len"}
    trainer = dataclasses.replace(trainer, **numbers, devices=processes, shard_size=shard_size)
    resolved = dataclasses.replace(config, data=dataclasses.replace(data, seq_len=seq_len), trainer=trainer)
    compiles = pick(trainer, "compile", device.has_compiler and compiling_pays(resolved))
    resolved = dataclasses.replace(resolved, trainer=dataclasses.replace(trainer, compile=compiles))
    return resolved, _sentences(chosen, resolved, full)


def on_devices(config: TrainConfig, strategy: str) -> TrainConfig:
    """The resolved run with another strategy on its devices. Raises UserError if they cannot share the model."""
    own, devices = config.trainer, config.trainer.devices
    trainer = dataclasses.replace(own, strategy=strategy, shard_size="auto")
    per_machine = own.shard_size if own.strategy == "hsdp" else math.gcd(devices, GPUS_OF_A_MACHINE)
    size = _shard_size(config.model, trainer, devices, per_machine)
    return dataclasses.replace(config, trainer=dataclasses.replace(trainer, shard_size=size))


def _shard_size(model: ModelConfig, trainer: TrainerConfig, devices: int, per_machine: int) -> int:
    """Ranks that share master weights and moments. Raises UserError if they cannot have equally many columns."""
    width = model.d_model
    key, size = "trainer.devices", {"fsdp": devices, "hsdp": per_machine}.get(trainer.strategy, 1)
    if trainer.strategy == "hsdp":
        key, size = "trainer.shard_size", size if trainer.shard_size == "auto" else trainer.shard_size
        if devices % size:
            raise UserError(f"trainer.shard_size={size}: must divide the {devices} devices")
    if width % size:
        fitting = ", ".join(str(n) for n in range(1, min(width, MOST_LISTED) + 1) if width % n == 0)
        raise UserError(
            f"{key}={size}: trainer={trainer.strategy} gives each of them as many columns of a matrix, so it must "
            f"divide model.d_model={width}: {fitting}"
        )
    return size


def compiling_pays(config: TrainConfig) -> bool:
    """Whether compiled blocks are expected to save more time on a GPU than compiling them takes.

    On a CPU they are not: docs/performance.md has the measurement. Blocks that ranks share (fsdp, hsdp) stay eager,
    because no GPU has run them compiled.
    """
    if config.trainer.device != "cuda" or config.trainer.strategy in ("fsdp", "hsdp"):
        return False
    seconds = config_ledger(config).spent(config.trainer.max_steps).total / config.trainer.devices / CUDA_FLOPS_PER_S
    sizes = {
        (shape.model.n_heads, shape.model.n_kv_heads, shape.model.d_ff, shape.scales_layers)
        for shape in stage_subnetworks(config)
    }
    return seconds * COMPILE_SAVES > COMPILE_S * len(sizes)


def _sentences(chosen: dict[str, Any], config: TrainConfig, full_bytes: int) -> list[str]:
    said = {key: f"{'data' if key == 'seq_len' else 'trainer'}.{key}" for key in _TOLD if key in chosen}
    sizes = ", ".join(f"{name}={str(chosen[key]).lower()}" for key, name in said.items())
    lines = [f"chosen for {config.trainer.device}: {sizes}"] if sizes else []
    if chosen.get("save_final", "full") != "full":
        lines.append(
            f"the final checkpoint would hold {full_bytes / 1e9:.1f} GB: trainer.save_final="
            f"{chosen['save_final']} was chosen; trainer.save_final=full or weights writes it"
        )
    return lines


def n_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
