"""Triton's kernels without a GPU: interpreted, and compiled for one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the tests run on it")
def test_the_interpreter_agrees_with_pytorch():
    files = [str(path) for path in sorted(FOLDER.glob("test_triton_*.py"))]
    assert len(files) == 1
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout


def test_every_kernel_compiles_for_a_gpu_that_is_not_here():
    """bf16 and the compiler's own checks, neither of which the interpreter knows."""
    run = subprocess.run([sys.executable, FOLDER / "compile_for_hopper.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    accesses = dict(line.split(": ") for line in run.stdout.splitlines())
    assert set(accesses.values()) == {"16 bytes at a time"}
    assert len(accesses) == 7
