"""python -m est_cli.benchmark.gpu: all to measure on a GPU, in under 20 minutes; needs only torch, numpy and triton.

Triton's kernels against float64, the operations against the roofs of the machine, steps of GPT-2 and TinyLlama (eager,
compiled, with Triton; against transformers if it is installed), and a trace. Every row is measured in its own process
and written at once to `rows.jsonl` and `results.md`, a table to paste. The same command continues; rows of another
machine or of other code are measured again. `--device cpu` does the same on a CPU.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from traceback import format_exception_only
from typing import Any

import torch

from est_cli.benchmark.case import PRESETS, THREE_STAGES, Case
from est_cli.benchmark.kernels import OPERATIONS, all_checks, measure_roofs, time_operation
from est_cli.benchmark.measure import Cells, in_own_process, machine, markdown, measure, shown, stage_cells
from est_cli.benchmark.steps import Stepper
from est_cli.files import replacing
from est_cli.kernels.dispatch import has_triton, triton_kernels
from est_cli.subnet.schedule import Stage
from est_cli.training.profile import Profile

BATCHES = {"gpt2": (16, 1024), "tinyllama": (8, 2048)}
"""Sequences and their length: 16k tokens a step. A CPU takes one sequence."""
SETUPS = {"eager": ("torch", False), "compiled": ("torch", True), "triton": ("triton", False)}
"""Kernels, and whether the blocks are compiled."""
ROW_SECONDS, SHORTEST_ROW = 420, 20
"""The longest that a row may take, and the time that must be left to begin one."""
_TINY = {"n_layers": 2, "n_heads": 4, "d_model": 32, "head_dim": 8, "d_ff": 64, "vocab_size": 128, "max_seq_len": 16}


@dataclass(frozen=True)
class Machine:
    """Where the rows are measured, and how small."""

    device: str
    tiny: bool
    rounds: int
    folder: Path

    @property
    def name(self) -> str:
        """Rows of different names do not belong in one table."""
        return f"{machine(self.device)}, {self.rounds} rounds{', tiny sizes' if self.tiny else ''}"

    def case(self, model: str, setup: str = "eager") -> Case:
        kernels, compiled = SETUPS[setup]
        config, (batch, length) = PRESETS[model], BATCHES[model]
        if self.tiny:
            config = replace(config, n_kv_heads=4 * config.n_kv_heads // config.n_heads or 1, **_TINY)
        if self.tiny or self.device == "cpu":
            batch, length = 1, min(length, config.max_seq_len)
        options = {"precision": "bf16", "device": self.device, "kernels": kernels, "compile": compiled}
        return Case(config, batch_size=batch, seq_len=length, **options)


def roofs(here: Machine) -> dict[str, float]:
    return measure_roofs(torch.device(here.device))


def check(operation: str, here: Machine) -> dict[str, Any]:
    """Triton's version of an operation at every shape."""
    found = list(all_checks(operation, triton_kernels(), torch.device(here.device), [torch.float32, torch.bfloat16]))
    failed = [vars(one) for one in found if not one.passed]
    return {"checks": len(found), "failed": failed}


def operations(operation: str, model: str, here: Machine) -> list[dict[str, Any]]:
    """The versions of one operation, against the roofs."""
    return list(time_operation(operation, model, here.case(model), roofs(here), here.rounds))


def steps(model: str, setup: str, here: Machine) -> dict[str, Any]:
    """Every stage of a step, and the peer's full step; memory only in the plain setup."""
    against = "transformers" if find_spec("transformers") else None
    return measure(here.case(model, setup), here.rounds, against=against, memory=setup == "eager")


def trace(here: Machine) -> list[str]:
    """One step of GPT-2 in each stage, after two that warm up."""
    stepper, told = Stepper(here.case("gpt2")), []
    profile = Profile(here.folder / "trace-gpt2", torch.device(here.device), (2, 1), told.append)
    for index, spec in enumerate(THREE_STAGES):
        with profile.stage(Stage(index + 1, 0, 3, spec.rates, spec.grown), 0) as advance:
            for _ in range(3):
                stepper.step(index)
                advance()
    return told


ROWS: dict[str, Callable[[Machine], Any]] = {
    "roofs": roofs,
    **{f"check {operation}": partial(check, operation) for operation in OPERATIONS},
    **{f"steps {model} {setup}": partial(steps, model, setup) for model in BATCHES for setup in SETUPS},
    **{f"operation {operation} {model}": partial(operations, operation, model)
       for model in BATCHES for operation in OPERATIONS},
    "trace gpt2": trace,
}  # fmt: skip
"""Name → what measures it, in a process of its own; the most important first. Results are JSON."""


def outcome(row: str, here: Machine, seconds: float) -> dict[str, Any]:
    """The row's `result`, `error`, or why it is `skipped`."""
    if (row.startswith("check") or row.endswith("triton")) and not has_triton(here.device):
        return {"skipped": "needs a GPU with triton"}
    try:
        return {"result": in_own_process(ROWS[row], here, timeout=seconds)}
    except TimeoutError:
        return {"error": f"took more than {seconds:.0f} s"}
    except Exception as error:  # the other rows go on
        return {"error": format_exception_only(error)[-1].strip()}


def run(asked: Sequence[str], here: Machine, minutes: float, say: Callable[[str], None]) -> bool:
    """Measure the rows that `here.folder` lacks while there is time; return whether all are there and none failed."""
    here.folder.mkdir(parents=True, exist_ok=True)
    path, deadline = here.folder / "rows.jsonl", time.monotonic() + 60 * minutes
    lines = path.read_text().splitlines() if path.exists() else []
    same = {"machine": here.name, "code": code_hash()}
    written = {record["row"]: record for record in map(json.loads, lines) if same.items() <= record.items()}
    for number, row in enumerate(asked, 1):
        if "result" in written.get(row, {}):
            continue
        began = time.monotonic()
        if deadline - began < SHORTEST_ROW:
            say(f"{minutes:g} minutes are over; the same command continues")
            break
        found = outcome(row, here, min(deadline - began, ROW_SECONDS))
        written[row] = {"row": row, **same, "seconds": round(time.monotonic() - began, 1), **found}
        lines.append(json.dumps(written[row]))
        with replacing(path) as complete:
            complete.write_text("\n".join(lines) + "\n")
        (here.folder / "results.md").write_text(as_markdown(here.name, list(written.values())))
        say(f"{number} of {len(asked)} {row}: {found.get('error') or found.get('skipped') or 'done'}")
    return all("error" not in written.get(row, {"error": ""}) for row in asked)


def code_hash() -> str:
    """Tells the numbers of different versions of the code apart."""
    folder = Path(__file__).parents[1]
    parts = [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def as_markdown(machine: str, records: Sequence[dict[str, Any]]) -> str:
    """A table for each kind of row; the rows in the order in which they were measured."""
    lines = [f"{machine}; medians [quartiles]", ""]
    for kind, cells_of in _TABLES.items():
        own = [record for record in records if "result" in record and record["row"].split()[0] == kind]
        cells = [line for r in own for line in cells_of(r["row"].removeprefix(f"{kind} "), r["result"])]
        lines += [*markdown(cells), ""] if cells else []
    for word, name in (("skipped", "skipped"), ("failed", "error")):
        lines += [f"- {record['row']}: {word}, {record[name]}" for record in records if name in record]
    return "\n".join(lines).rstrip() + "\n"


def _roofs(_: str, result: dict[str, float]) -> Iterator[Cells]:
    products = {f"{name} product": f"{rate / 1e12:.2f} TFLOP/s" for name, rate in result.items() if name != "copy"}
    yield {"copy": f"{result['copy'] / 1e9:.0f} GB/s", **products}


def _checks(name: str, result: dict[str, Any]) -> Iterator[Cells]:
    failed = "; ".join(f"{one['name']} {one['error']:.2g} > {one['allowed']:.2g}" for one in result["failed"])
    yield {"kernel": f"Triton {name} against float64", "checks": str(result["checks"]), "result": failed or "all hold"}


def _steps(name: str, result: dict[str, Any]) -> Iterator[Cells]:
    for stage in result["stages"]:
        peer = result.get("against") if stage is result["stages"][-1] else None
        over = f"{shown(peer, 'time_ratio')} ({peer['setting']})" if peer else ""
        yield {"steps": name, **stage_cells(stage), "over transformers": over}


def _operations(_: str, result: list[dict[str, Any]]) -> Iterator[Cells]:
    for one in result:
        times = {"ms": f"{one['ms']:.3f}", "host ms": f"{one['host_ms']:.3f}", "rate": one["rate"]}
        ratios = {"of roof": f"{one['of_roof']:.0%}", "over torch": f"{one['over_torch']:.2f}"}
        yield {"operation": one["work"], "version": one["version"], **times, **ratios}


_TABLES: dict[str, Callable[[str, Any], Iterator[Cells]]] = {
    "roofs": _roofs,
    "check": _checks,
    "steps": _steps,
    "operation": _operations,
    "trace": lambda _, told: ({"trace": line} for line in told),
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m est_cli.benchmark.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs, and no speed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=19, help="what is not measured then is left")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch sees no GPU here; --device cpu --tiny shows that all of it runs")
    here = Machine(arguments.device, arguments.tiny, arguments.rounds, arguments.folder)
    complete = run(arguments.only, here, arguments.minutes, print)
    results = here.folder / "results.md"
    print(f"\n{results}:\n\n{results.read_text()}" if results.exists() else "nothing measured")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
