"""What the three operations take, against what the machine can do.

Memory limits pack and adamw: bytes over the time, as a part of what a plain copy moves. Matrix products limit the loss:
6·N·D·V FLOPs over the time, as a part of what a large product reaches. On a GPU `ms` is the device's time and `host ms`
what the call takes until it returns; on a CPU they are equal.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from est_cli.benchmark.case import THREE_STAGES
from est_cli.benchmark.kernel_cases import (
    Matrix,
    adamw_case,
    head_case,
    loss_and_gradients,
    model_matrices,
    pack_case,
    plain_loss,
    plain_pack,
)
from est_cli.config import ModelConfig
from est_cli.kernels.dispatch import TORCH, Kernels, has_triton, triton_kernels
from est_cli.training.subnetwork import DTYPES

OPERATIONS = ("pack", "adamw", "loss")
_SLEEP_CYCLES = 20_000_000
"""About 10 ms of a GPU: meanwhile the host can queue a whole call."""

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """One operation on one input: the versions that do it, and its cost."""

    name: str
    versions: Calls
    cost: float
    """Bytes, or FLOPs for the loss."""
    roof: float
    """Bytes or FLOPs a second that the machine reaches."""


def measure_roofs(device: torch.device) -> dict[str, float]:
    """Bytes a second of a `copy`, read and written, that no cache holds; FLOPs a second of a large matrix product."""
    is_gpu = device.type == "cuda"
    source, size = torch.ones(1 << (30 if is_gpu else 26), device=device), 8192 if is_gpu else 2048
    target = torch.empty_like(source)
    roofs = {"copy": 2 * source.nbytes / _best_of(lambda: target.copy_(source), device)}
    for name, dtype in DTYPES.items():
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        roofs[name] = 2 * size**3 / _best_of(lambda left=left, right=right: left @ right, device)
    return roofs


def works(
    operation: str, model: str, config: ModelConfig, tokens: int, roofs: dict[str, float], device: torch.device
) -> Iterator[Work]:
    """One of OPERATIONS at the sizes of a model: every stage, precision and setting."""
    kernels = {"torch": TORCH} | ({"triton": triton_kernels()} if has_triton(device) else {})
    if operation == "loss":
        for precision, dtype in DTYPES.items():
            yield _loss(
                f"loss {model} {tokens} tokens {precision}", config, tokens, dtype, kernels, roofs[precision], device
            )
        return
    for number, stage in enumerate(THREE_STAGES, 1):
        matrices = model_matrices(config, stage.rates)
        for setting in DTYPES if operation == "pack" else ("zero_grad", "freeze"):
            make = _pack if operation == "pack" else _adamw
            calls, cost = make(matrices, setting, kernels, device)
            if cost:
                yield Work(f"{operation} {model} stage {number} {setting}", calls, cost, roofs["copy"])


def _pack(matrices: list[Matrix], precision: str, kernels: dict[str, Kernels], device) -> tuple[Calls, float]:
    case = pack_case(matrices, DTYPES[precision], device)
    calls = {name: partial(k.gather_rows, case.sources, case.rows, case.slots) for name, k in kernels.items()}
    cost = sum(slot.numel() * (4 + slot.element_size()) for slot in case.slots)
    return {"plain": partial(plain_pack, case)} | calls, cost


def _adamw(matrices: list[Matrix], unsampled: str, kernels: dict[str, Kernels], device) -> tuple[Calls, float]:
    """Bytes: parameter and moments in and out, and the gradient in."""
    freeze, clip = unsampled == "freeze", torch.tensor(0.5, device=device)
    moves = adamw_case(matrices, freeze, device)
    calls: Calls = {name: partial(k.adamw_step, moves, clip) for name, k in kernels.items()}
    if not freeze and all(m.sampled is None for m in matrices):
        # torch.optim.AdamW in its fastest form, on every element: no clipping, no sampled rows.
        parameters = [torch.zeros(m.rows, m.columns, device=device, requires_grad=True) for m in matrices]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        calls = {"fused": torch.optim.AdamW(parameters, fused=True).step} | calls
    moved = sum(m.trained if freeze else m.rows * m.columns for m in matrices)
    return calls, 24 * moved + 4 * sum(m.trained for m in matrices)


def _loss(
    name: str, config: ModelConfig, tokens: int, dtype: torch.dtype, kernels: dict[str, Kernels], roof: float, device
) -> Work:
    inputs = head_case(tokens, config.d_model, config.vocab_size, dtype, device)
    functions = {"plain": plain_loss} | {name: k.linear_cross_entropy for name, k in kernels.items()}
    calls = {name: partial(loss_and_gradients, function, *inputs) for name, function in functions.items()}
    return Work(name, calls, 6 * tokens * config.d_model * config.vocab_size, roof)


def timings(work: Work, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """The versions, timed in turns: medians."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work.versions}
    for number in range(rounds + 2):
        for name, call in work.versions.items():
            taken = timed(call, device)
            if number >= 2:
                times[name].append(taken)
    unit, scale = ("TFLOP/s", 1e12) if work.name.startswith("loss") else ("GB/s", 1e9)
    for name, pairs in times.items():
        seconds, host = (statistics.median(column) for column in zip(*pairs, strict=True))
        yield {
            "version": name,
            "ms": seconds * 1e3,
            "host_ms": host * 1e3,
            "rate": f"{work.cost / seconds / scale:.4g} {unit}",
            "of_roof": work.cost / seconds / work.roof,
            "over_torch": statistics.median(a[0] / b[0] for a, b in zip(pairs, times["torch"], strict=True)),
        }


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds that the device worked, and seconds until the call returned."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start,) * 2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, host


def _best_of(call: Callable[[], object], device: torch.device) -> float:
    return min(timed(call, device)[0] for _ in range(7))
