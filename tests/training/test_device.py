"""What a training process does with a CPU's memory."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from est_cli.training.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def touch():
    torch.ones(16 << 20)  # 64 MiB: 16,384 pages of 4 KiB
def touch_five_times():
    for _ in range(5):
        touch()
touch_five_times()  # until the block has found its place between the small ones
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch_five_times()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_that_a_step_frees_is_there_for_the_next_one():
    faults = {
        choice: int(subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, check=True).stdout)
        for choice in ("kept", "usual")
    }
    assert faults["kept"] < faults["usual"] / 10
