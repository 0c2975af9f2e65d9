"""Compiles every kernel for an H200 (compute capability 9.0), and prints how each reaches memory."""

import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from est_cli.kernels.triton_kernels import (
    BLOCK,
    ROW_THREADS,
    THREADS,
    TILE,
    WIDTH,
    _adamw_tile,
    _gather_tile,
    _softmax_gradient_row,
)  # fmt: skip

TILES = {"JOBS": 256, "GROUPS": TILE // WIDTH, "WIDTH": WIDTH}
SCALARS = dict.fromkeys(("new_moment", "beta2", "new_square", "eps"), "fp32")
ADAMW = {"table": "*i64", "indices": "*i32", "numbers": "*fp32", "clip": "*fp32", **SCALARS}


def compiled(kernel, types: dict[str, str], constants: dict, threads: int) -> str:
    """How much a thread reads and writes at once. Pointers are aligned, as torch's allocations are."""
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")},
    )
    ptx = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": threads // 32}).asm["ptx"]
    wide = all(re.search(rf"{access}\.global[.\w:]*\.v4\.b32", ptx) for access in ("ld", "st"))
    return "16 bytes at a time" if wide else "less than 16 bytes at a time"


def main() -> None:
    for slot in (tl.bfloat16, tl.float32):
        constants = {"SOURCE": tl.float32, "SLOT": slot, **TILES}
        print(f"pack {slot}:", compiled(_gather_tile, {"table": "*i64"}, constants, THREADS))
    for freeze in (False, True):
        print(f"adamw freeze={freeze}:", compiled(_adamw_tile, ADAMW, {"FREEZE": freeze, **TILES}, THREADS))
    for kind, vocabulary in (("bf16", 50304), ("bf16", 32000), ("fp32", 50304)):
        types = {"logits": f"*{kind}", "targets": "*i64", "target_stride": "i32", "losses": "*fp32"}
        constants = {"COLUMNS": vocabulary, "BLOCK": BLOCK}
        print(f"loss {kind} {vocabulary}:", compiled(_softmax_gradient_row, types, constants, ROW_THREADS))


if __name__ == "__main__":
    main()
