"""What the device and its compiler can do, and the memory and threads of this process."""

import contextlib
import ctypes
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from est_cli.config import TrainerConfig
from est_cli.config.auto import Device
from est_cli.errors import UserError
from est_cli.kernels.dispatch import kernels_for
from est_cli.model.transformer import Transformer
from est_cli.training.distributed import launched_ranks

PEAK_BF16_FLOPS = {
    # Dense bf16 tensor-core rates of NVIDIA's datasheets, FLOP/s. The name is matched as a part of CUDA's.
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10G": 70e12,
    "T4": 65e12,
}
MOST_SIZES = 64
"""Sizes of block that one process compiles. torch's own limit is 8; beyond it blocks run eagerly with a warning."""
Result = TypeVar("Result")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
"""Options of glibc's mallopt, see malloc.h."""


def available_device(trainer: TrainerConfig, kernels: str) -> Device:
    """The device that `trainer` asks for. Raises UserError if torch sees none, or none that `kernels` can use."""
    has_cuda = torch.cuda.is_available()
    if trainer.device == "cuda" and not has_cuda:
        raise UserError("trainer.device=cuda: torch sees no GPU here; allowed: auto, cpu")
    kind = "cuda" if has_cuda and trainer.device != "cpu" else "cpu"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]
    has_compiler = any(map(shutil.which, compilers))
    if trainer.compile is True and not has_compiler:
        # torch.compile would say so in the middle of the first step.
        raise UserError(
            "trainer.compile=true: torch.compile needs a C++ compiler, and there is no "
            f"{' or '.join(compilers)} on PATH; install one, name it in CXX, or give trainer.compile=false"
        )
    kernels_for(kernels, kind)  # raises UserError
    compiles = has_compiler and (kind == "cpu" or find_spec("triton") is not None)
    present = torch.cuda.device_count() if kind == "cuda" else 1
    if (ranks := launched_ranks()) > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        _check_launched(trainer, ranks, here, present if kind == "cuda" else None)
        return Device(kind, ranks, here, compiles)
    devices = present if trainer.devices == "auto" else trainer.devices
    if kind == "cuda" and devices > present:
        raise UserError(f"trainer.devices={devices}: this machine has {present}")
    return Device(kind, devices, devices, compiles)


def _check_launched(trainer: TrainerConfig, ranks: int, here: int, gpus: int | None) -> None:
    """Raises UserError if `trainer` is not for the processes that torchrun started."""
    if trainer.strategy == "single":
        raise UserError(
            f"trainer.strategy=single: {ranks} processes were started; give trainer=ddp, trainer=fsdp or trainer=hsdp"
        )
    if trainer.devices not in ("auto", ranks):
        raise UserError(f"trainer.devices={trainer.devices}: {ranks} processes were started; leave it out")
    if gpus is not None and here > gpus:
        raise UserError(f"{here} processes were started on this machine, which has {gpus} GPUs; start one for each")


def peak_flops(device: torch.device, precision: str, given: float | None) -> float | None:
    """Peak FLOP/s for perf/mfu: what the user gave, or the table's for a known GPU in bf16, else None."""
    if given is not None or device.type != "cuda" or precision != "bf16":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


class Compiler:
    """Compiles the blocks of every stage if `wanted`. Stages whose blocks have equal sizes share the code.

    torch keeps compiled code on disk too (TORCHINDUCTOR_CACHE_DIR), where the next run finds it.
    """

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self._told = (0.0, 0, 0)

    def compile(self, model: Transformer) -> None:
        if self.wanted:
            from torch._dynamo import config  # 2 s, which only a compiled run needs

            config.recompile_limit = max(config.recompile_limit, MOST_SIZES)
            model.compile_blocks()

    def eager(self) -> contextlib.AbstractContextManager:
        """Evaluations run eagerly: their sizes would need graphs of their own, and est-eval finds the same loss."""
        return torch.compiler.set_stance("force_eager") if self.wanted else contextlib.nullcontext()

    def news(self) -> str | None:
        """What was compiled since the last call; None if nothing was."""
        if not self.wanted:
            return None
        from torch._dynamo.utils import calculate_time_spent, counters

        found, made = (counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss"))
        now = (calculate_time_spent()["total_wall_time"], found, made)
        if now == self._told:
            return None
        seconds, found, made = (new - old for new, old in zip(now, self._told, strict=True))
        self._told = now
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torch's cache")
        return f"compiled in {seconds:.1f} s: {made} new graphs, {found} found in {cache}"


def keep_freed_memory() -> None:
    """Keep a CPU's memory in the process when a tensor is freed: the next step asks for the same sizes again.

    glibc returns large blocks to the system at once, and every step then waits for the same pages to be made and
    zeroed again (docs/performance.md has the times). Other C libraries are left as they are.
    """
    _mallopt((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """The opposite, for ranks: FSDP's buffers have many sizes and would leave holes, as large as what is in use."""
    _mallopt((_M_MMAP_THRESHOLD, 1 << 20))


def _mallopt(*options: tuple[int, int]) -> None:
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option in options if mallopt else ():
        mallopt(*option)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # A sandbox may forbid it, and only Linux has it: the peak then includes what came before.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes held since the reset: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def set_threads(threads: int | None) -> None:
    """CPU threads of this process; None leaves torch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def in_thread(call: Callable[[], Result]) -> Future[Result]:
    """Call in a daemon thread. An executor's threads would keep a process that ends waiting for them."""
    made: Future[Result] = Future()

    def make() -> None:
        try:
            made.set_result(call())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=make, daemon=True).start()
    return made


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
