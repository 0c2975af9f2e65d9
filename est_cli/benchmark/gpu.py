"""python -m est_cli.benchmark.gpu: all that a GPU has to show, in under 20 minutes; needs only torch, numpy and triton.

Triton's kernels against float64, the operations against the roofs of the machine, steps of GPT-2 and TinyLlama (eager,
compiled, with Triton; against transformers if it is installed), and a trace. Every row is measured in its own process
and written at once to `rows.jsonl` and `results.md`, a table to paste. The same command continues; rows of another
machine or of other code are measured again. `--device cpu` does the same on a CPU.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from est_cli.benchmark.case import PRESETS, THREE_STAGES, Case
from est_cli.benchmark.kernel_cases import all_checks
from est_cli.benchmark.kernels import OPERATIONS, measure_roofs, timings, works
from est_cli.benchmark.measure import Stepper, measure
from est_cli.config import ModelConfig
from est_cli.kernels.dispatch import has_triton, triton_kernels
from est_cli.subnet.schedule import Stage
from est_cli.training.profile import Profile
from est_cli.training.subnetwork import DTYPES
from est_cli.units import format_bytes, format_interval, format_percent

BATCHES = {"gpt2": (16, 1024), "tinyllama": (8, 2048)}
"""Sequences and their length: 16k tokens a step."""
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
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def name(self) -> str:
        """Rows of different names do not belong in one table."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        return f"{name}, torch {torch.__version__}, {self.rounds} rounds{', tiny sizes' if self.tiny else ''}"

    @property
    def tokens(self) -> int:
        """Of one loss."""
        return 64 if self.tiny else 1024 if self.device == "cpu" else 16384

    def model(self, name: str) -> ModelConfig:
        model = PRESETS[name]
        return replace(model, n_kv_heads=4 * model.n_kv_heads // model.n_heads or 1, **_TINY) if self.tiny else model

    def case(self, model: str, kernels: str = "torch", compiled: bool = False) -> Case:
        batch, length = (2, 16) if self.tiny else BATCHES[model]
        options = {"precision": "bf16", "device": self.device, "kernels": kernels, "compile": compiled}
        return Case(self.model(model), batch_size=batch, seq_len=length, **options)

    def lacks(self, *needs: str) -> str | None:
        """Why a row with these needs cannot be measured here."""
        if "triton" not in needs or has_triton(self.device):
            return None
        interpreted = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted and "interpreter" in needs else "needs a GPU with triton"


@dataclass(frozen=True)
class Row:
    """Something to measure: its result is JSON."""

    name: str
    measure: Callable[[Machine], Any]
    needs: tuple[str, ...] = ()


def rows() -> Iterator[Row]:
    """All of them, the most important first."""
    yield Row("roofs", roofs)
    for operation in OPERATIONS:
        yield Row(f"check {operation}", partial(check, operation), ("triton", "interpreter"))
    for model in BATCHES:
        for setup, (kernels, compiled) in SETUPS.items():
            needs = ("triton",) if kernels == "triton" else ()
            yield Row(f"steps {model} {setup}", partial(steps, model, kernels, compiled), needs)
    for model in BATCHES:
        for operation in OPERATIONS:
            yield Row(f"operation {operation} {model}", partial(operations, operation, model))
    yield Row("trace gpt2", partial(trace, "gpt2"))


def roofs(here: Machine) -> dict[str, float]:
    """Bytes a second of a copy, FLOPs a second of a product."""
    return measure_roofs(here.torch_device)


def check(operation: str, here: Machine) -> dict[str, Any]:
    """Triton's version of an operation at every shape."""
    interpreted = here.device == "cpu"  # which knows no bf16
    dtypes = [torch.float32, torch.float16 if interpreted else torch.bfloat16]
    found = list(all_checks(operation, triton_kernels(), here.torch_device, dtypes))
    failed = [vars(one) for one in found if not one.passed]
    return {"checks": len(found), "failed": failed, "interpreted": interpreted}


def operations(operation: str, model: str, here: Machine) -> list[dict[str, Any]]:
    """The versions of one operation, against the roofs."""
    device = here.torch_device
    found = works(operation, model, here.model(model), here.tokens, measure_roofs(device), device)
    return [{"work": work.name, **timing} for work in found for timing in timings(work, device, here.rounds)]


def steps(model: str, kernels: str, compiled: bool, here: Machine) -> dict[str, Any]:
    """Every stage of a step, and the peer's full step; memory only in the plain setup."""
    against = "transformers" if find_spec("transformers") else None
    is_plain = (kernels, compiled) == SETUPS["eager"]
    return measure(here.case(model, kernels, compiled), here.rounds, against=against, memory=is_plain)


def trace(model: str, here: Machine) -> list[str]:
    """One step of each stage after two that warm up."""
    stepper, told = Stepper(here.case(model)), []
    profile = Profile(here.folder / f"trace-{model}", here.torch_device, (2, 1), told.append)
    for index, spec in enumerate(THREE_STAGES):
        with profile.stage(Stage(index + 1, 0, 3, spec.rates, spec.grown), 0) as advance:
            for _ in range(3):
                stepper.step(index)
                advance()
    return told


def in_own_process(row: Row, here: Machine, seconds: float) -> dict[str, Any]:
    """The row's result, or its error: the other rows go on."""
    command = [sys.executable, "-m", "est_cli.benchmark.gpu", "--row", row.name, "--device", here.device]
    command += ["--rounds", str(here.rounds), "--folder", str(here.folder), *(["--tiny"] if here.tiny else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {seconds:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return {"result": json.loads(done.stdout.splitlines()[-1])}


def run(
    asked: Sequence[Row],
    here: Machine,
    minutes: float,
    say: Callable[[str], None],
    measured: Callable[[Row, Machine, float], dict[str, Any]] = in_own_process,
) -> bool:
    """Measure the rows that `here.folder` lacks while there is time; return whether all are there and none failed."""
    here.folder.mkdir(parents=True, exist_ok=True)
    path, deadline = here.folder / "rows.jsonl", time.monotonic() + 60 * minutes
    same = {"machine": here.name, "code": code_hash()}
    written = {record["row"]: record for record in read_rows(path) if same.items() <= record.items()}
    for number, row in enumerate(asked, 1):
        if "result" in written.get(row.name, {}):
            continue
        left = deadline - time.monotonic()
        if left < SHORTEST_ROW:
            say(f"{minutes:g} minutes are over; the same command continues")
            break
        began, reason = time.monotonic(), here.lacks(*row.needs)
        outcome = {"skipped": reason} if reason else measured(row, here, min(left, ROW_SECONDS))
        written[row.name] = {"row": row.name, **same, "seconds": round(time.monotonic() - began, 1), **outcome}
        is_cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with path.open("a") as file:
            file.write("\n" * is_cut_off + json.dumps(written[row.name]) + "\n")
        (here.folder / "results.md").write_text(as_markdown(here.name, list(written.values())))
        say(f"{number} of {len(asked)} {row.name}: {outcome.get('error') or outcome.get('skipped') or 'done'}")
    return all("error" not in written.get(row.name, {"error": ""}) for row in asked)


def code_hash() -> str:
    """Tells the numbers of different versions of the code apart."""
    folder = Path(__file__).parents[1]
    parts = [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """What has been written, without a line that was cut off when the machine was taken away."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def as_markdown(machine: str, records: Sequence[dict[str, Any]]) -> str:
    """Tables of all rows, in the order in which they were measured."""
    found = {record["row"]: record["result"] for record in records if "result" in record}
    parts = {kind: {n.removeprefix(f"{kind} "): r for n, r in found.items() if n.startswith(kind)} for kind in _TABLES}
    lines = [f"{machine}; medians [quartiles]", ""]
    for kind, (columns, lines_of) in _TABLES.items():
        if parts[kind]:
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(cells)} |" for n, r in parts[kind].items() for cells in lines_of(n, r)] + [""]
    lines += [f"- {record['row']}: skipped, {record['skipped']}" for record in records if "skipped" in record]
    lines += [f"- {record['row']}: failed, {record['error']}" for record in records if "error" in record]
    return "\n".join(lines).rstrip() + "\n"


def _roof_lines(_: str, result: dict[str, float]) -> Iterator[list[str]]:
    yield [f"{result['copy'] / 1e9:.0f} GB/s", *(f"{result[name] / 1e12:.2f} TFLOP/s" for name in DTYPES)]


def _check_lines(name: str, result: dict[str, Any]) -> Iterator[list[str]]:
    failed = "; ".join(f"{one['name']} {one['error']:.2g} > {one['allowed']:.2g}" for one in result["failed"])
    where = "interpreted" if result["interpreted"] else "GPU"
    yield [f"Triton {name} against float64", where, str(result["checks"]), failed or "all hold"]


def _step_lines(name: str, result: dict[str, Any]) -> Iterator[list[str]]:
    for stage in result["stages"]:
        is_full = stage["efficiency"] is None
        peer = result.get("against") if is_full else None
        yield [
            name,
            str(stage["stage"]),
            f"{stage['step_s'] * 1e3:.2f}",
            format_interval(stage["time_ratio"], stage["time_ratio_quartiles"]),
            f"{stage['flops_ratio']:.3f}",
            "" if is_full else format_interval(stage["efficiency"], stage["efficiency_quartiles"]),
            format_percent(stage["mfu"]),
            format_bytes(stage["peak_memory_bytes"]),
            f"{format_interval(peer['time_ratio'], peer['time_ratio_quartiles'])} ({peer['setting']})" if peer else "",
        ]


def _operation_lines(_: str, result: list[dict[str, Any]]) -> Iterator[list[str]]:
    for one in result:
        times = [f"{one['ms']:.3f}", f"{one['host_ms']:.3f}", one["rate"], f"{one['of_roof']:.0%}"]
        yield [one["work"], one["version"], *times, f"{one['over_torch']:.2f}"]


_TABLES: dict[str, tuple[list[str], Callable[[str, Any], Iterator[list[str]]]]] = {
    "roofs": (["copy", *(f"{name} product" for name in DTYPES)], _roof_lines),
    "check": (["kernel", "where", "checks", "result"], _check_lines),
    "steps": (
        ["steps", "stage", "ms", "over full", "FLOPs", "efficiency", "MFU", "peak memory", "over transformers"],
        _step_lines,
    ),
    "operation": (["operation", "version", "ms", "host ms", "rate", "of roof", "over torch"], _operation_lines),
    "trace": (["trace"], lambda _, told: ([line] for line in told)),
}


def main() -> None:
    everything = {row.name: row for row in rows()}
    parser = argparse.ArgumentParser("python -m est_cli.benchmark.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs, and no speed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=19, help="what is not measured then is left")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--only", nargs="+", choices=list(everything), default=list(everything), metavar="ROW")
    parser.add_argument("--row", choices=list(everything), metavar="ROW", help="measure one row, and print it")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch sees no GPU here; --device cpu --tiny shows that all of it runs")
    here = Machine(arguments.device, arguments.tiny, arguments.rounds, arguments.folder)
    if arguments.row:
        print(json.dumps(everything[arguments.row].measure(here)))
        return
    complete = run([everything[name] for name in arguments.only], here, arguments.minutes, print)
    results = here.folder / "results.md"
    print(f"\n{results}:\n\n{results.read_text()}" if results.exists() else "nothing measured")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
