"""python -m est_cli.benchmark.kernels: what the three operations take, against what the machine can do.

pack and adamw are bound by memory: bytes over the time, as a part of what a plain copy moves. The loss is bound
by its matrix products: 6·N·D·V FLOPs over the time, as a part of what a large product reaches. On a GPU `ms` is
the device's time alone and `host ms` what the call takes until it returns; on a CPU they are one.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from est_cli.benchmark.arguments import PRESETS
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
from est_cli.subnet.schedule import Rates
from est_cli.training.subnetwork import DTYPES

STAGES = {1: Rates(0.5, 0.5, 0.5), 2: Rates(0.5, 0.5), 3: Rates()}
OPERATIONS = ("pack", "adamw", "loss")
SLEEP_CYCLES = 20_000_000
"""About 10 ms of a GPU: in its shadow the host queues a call whole."""


@dataclass(frozen=True)
class Work:
    """One operation on one input: the versions that do it, and its cost."""

    name: str
    versions: dict[str, Callable[[], object]]
    cost: float
    """Bytes, or FLOPs for the loss."""
    roof: float
    """Bytes or FLOPs a second that the machine reaches."""


def main() -> None:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("python -m est_cli.benchmark.kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=None)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=None, help="of one loss; 16384 on a GPU, 1024 on a CPU")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    models = arguments.models or (["gpt2", "tinyllama"] if device.type == "cuda" else ["gpt2"])
    tokens = arguments.tokens or (16384 if device.type == "cuda" else 1024)
    roofs = measure_roofs(device, arguments.precisions)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: copy {roofs['copy'] / 1e9:.0f} GB/s", end="")
    print("".join(f", {name} product {roofs[name] / 1e12:.2f} TFLOP/s" for name in arguments.precisions))
    print(f"{'operation':44}{'version':>8}{'ms':>10}{'host ms':>9}{'rate':>14}{'of roof':>9}{'over torch':>12}")
    for model in models:
        for operation in arguments.operations:
            for work in works(operation, model, ModelConfig(**PRESETS[model]), tokens, roofs, device):
                for found in timings(work, device, arguments.rounds):
                    print(
                        f"{work.name:44}{found['version']:>8}{found['ms']:>10.3f}{found['host_ms']:>9.3f}"
                        f"{found['rate']:>14}{found['of_roof']:>9.0%}{found['over_torch']:>12.2f}"
                    )


def measure_roofs(device: torch.device, precisions: Sequence[str]) -> dict[str, float]:
    """Bytes a second of a `copy`, and FLOPs a second of a product in each precision."""
    return {"copy": copy_rate(device)} | {name: product_rate(DTYPES[name], device) for name in precisions}


def works(
    operation: str, model: str, config: ModelConfig, tokens: int, roofs: dict[str, float], device: torch.device
) -> Iterator[Work]:
    """One of OPERATIONS at the sizes of a model, in every precision that has a roof."""
    precisions = [name for name in roofs if name in DTYPES]
    if operation == "loss":
        yield from (loss_work(model, config, tokens, name, roofs[name], device) for name in precisions)
    elif operation == "pack":
        yield from pack_work(model, config, precisions, roofs["copy"], device)
    else:
        yield from adamw_work(model, config, roofs["copy"], device)


def versions(device: torch.device) -> dict[str, Kernels]:
    """PyTorch's, and Triton's where it runs."""
    return {"torch": TORCH, "triton": triton_kernels()} if has_triton(device) else {"torch": TORCH}


def pack_work(model: str, config: ModelConfig, precisions: list[str], roof: float, device) -> Iterator[Work]:
    for stage, rates in STAGES.items():
        for precision in precisions:
            case = pack_case(model_matrices(config, rates), DTYPES[precision], device)
            cost = sum(slot.numel() * (4 + slot.element_size()) for slot in case.slots)
            calls = {
                name: lambda kernels=kernels, case=case: kernels.gather_rows(case.sources, case.rows, case.slots)
                for name, kernels in versions(device).items()
            }
            if case.slots:
                plain = {"plain": lambda case=case: plain_pack(case)}
                yield Work(f"pack {model} stage {stage} {precision}", plain | calls, cost, roof)


def adamw_work(model: str, config: ModelConfig, roof: float, device) -> Iterator[Work]:
    clip = torch.tensor(0.5, device=device)
    for stage, rates in STAGES.items():
        for freeze in (False, True):
            matrices = model_matrices(config, rates)
            moves = adamw_case(matrices, freeze, device)
            calls = {
                name: lambda kernels=kernels, moves=moves: kernels.adamw_step(moves, clip)
                for name, kernels in versions(device).items()
            }
            if stage == 3 and not freeze:
                calls = {"fused": torch_adamw(matrices, device)} | calls
            name = f"adamw {model} stage {stage} {'freeze' if freeze else 'zero_grad'}"
            yield Work(name, calls, adamw_bytes(matrices, freeze), roof)
            del moves, calls


def adamw_bytes(matrices: list[Matrix], freeze: bool) -> float:
    """Parameter and moments in and out, and the gradient in."""
    moved = sum(m.trained if freeze else m.rows * m.columns for m in matrices)
    return 24 * moved + 4 * sum(m.trained for m in matrices)


def torch_adamw(matrices: list[Matrix], device) -> Callable[[], object]:
    """torch.optim.AdamW in its fastest form, on every element: no clipping, no sampled rows."""
    parameters = [torch.zeros(m.rows, m.columns, device=device, requires_grad=True) for m in matrices]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, fused=True).step


def loss_work(model: str, config: ModelConfig, tokens: int, precision: str, roof: float, device) -> Work:
    inputs = head_case(tokens, config.d_model, config.vocab_size, DTYPES[precision], device)
    calls = {"plain": lambda: loss_and_gradients(plain_loss, *inputs)} | {
        name: lambda kernels=kernels: loss_and_gradients(kernels.linear_cross_entropy, *inputs)
        for name, kernels in versions(device).items()
    }
    cost = 6 * tokens * config.d_model * config.vocab_size
    return Work(f"loss {model} {tokens} tokens {precision}", calls, cost, roof)


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
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, host


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_of(lambda: target.copy_(source), device)


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_of(lambda: left @ right, device)


def best_of(call: Callable[[], object], device: torch.device) -> float:
    return min(timed(call, device)[0] for _ in range(7))


if __name__ == "__main__":
    main()
