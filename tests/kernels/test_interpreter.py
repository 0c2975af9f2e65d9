"""Triton's kernels without a GPU: interpreted, and compiled for one."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernels.device import HAS_GPU

FOLDER = Path(__file__).parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ADAMW = {"table": "*i64", "indices": "*i32", "numbers": "*fp32", "clip": "*fp32"}
ADAMW |= dict.fromkeys(("new_moment", "beta2", "new_square", "eps"), "fp32")
LOSS = {"targets": "*i64", "target_stride": "i32", "losses": "*fp32"}
KERNELS = [
    *(("_gather_tile", {"table": "*i64"}, {"SOURCE": "float32", "SLOT": slot}) for slot in ("bfloat16", "float32")),
    *(("_adamw_tile", ADAMW, {"FREEZE": freeze}) for freeze in (False, True)),
    *(
        ("_softmax_gradient_row", {"logits": f"*{kind}", **LOSS}, {"COLUMNS": vocabulary})
        for kind, vocabulary in (("bf16", 50304), ("bf16", 32000), ("fp32", 50304))
    ),
]


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here: the tests run on it")
def test_the_interpreter_agrees_with_pytorch():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", FOLDER / "test_triton_kernels.py"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout


@pytest.mark.parametrize(("name", "types", "constants"), KERNELS)
def test_a_kernel_compiles_for_an_h200_and_reaches_memory_16_bytes_at_a_time(name, types, constants):
    """The interpreter knows neither bf16 nor the compiler's checks. Pointers are aligned, as torch's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from est_cli.kernels import triton_kernels as ours

    kernel, threads = getattr(ours, name), ours.ROW_THREADS if "COLUMNS" in constants else ours.THREADS
    common = {"BLOCK": ours.BLOCK, "JOBS": 256, "GROUPS": ours.TILE // ours.WIDTH, "WIDTH": ours.WIDTH}
    constants = {key: getattr(triton.language, v) if isinstance(v, str) else v for key, v in constants.items()}
    constants |= {key: value for key, value in common.items() if key in kernel.arg_names}
    place = kernel.arg_names.index
    source = ASTSource(
        kernel,
        {argument: types.get(argument, "constexpr") for argument in kernel.arg_names},
        {(place(key),): value for key, value in constants.items()},
        {(place(key),): [["tt.divisibility", 16]] for key, kind in types.items() if kind.startswith("*")},
    )
    ptx = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": threads // 32}).asm["ptx"]
    assert all(re.search(rf"{access}\.global[.\w:]*\.v4\.b32", ptx) for access in ("ld", "st"))
