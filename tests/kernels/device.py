"""Where the kernels are tested: Triton's compiled on a GPU, or interpreted on CPU tensors; and what torch allocates."""

from collections.abc import Callable

import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the most CPU memory that one operation of torch allocates during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())
