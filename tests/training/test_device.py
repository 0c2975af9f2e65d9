"""A training process keeps the memory that it frees on a CPU."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from est_cli.training.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)  # 64 MiB: 16,384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()  # until the block has found its place between the small ones
print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_that_a_step_frees_is_there_for_the_next_one():
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout
    usual, kept = map(int, output.split())
    assert kept < usual / 10
