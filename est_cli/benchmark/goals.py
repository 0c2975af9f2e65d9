"""python -m est_cli.benchmark.goals: this CPU's numbers beside their goals; about a quarter of an hour on two cores.

Needs transformers (the peer) beside torch and numpy. docs/performance.md has the goals that need a GPU.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from est_cli.benchmark.case import PRESETS, THREE_STAGES, Case
from est_cli.benchmark.measure import measure, peak_in_own_process, summary
from est_cli.benchmark.peer import SETTINGS
from est_cli.units import format_interval

GPT2 = Case(PRESETS["gpt2"])
_SIZES = {
    "n_layers": 12,
    "n_heads": 12,
    "n_kv_heads": 4,
    "d_model": 768,
    "head_dim": 64,
    "d_ff": 2048,
    "max_seq_len": 1024,
}
LLAMA = Case(replace(PRESETS["tinyllama"], **_SIZES), stages=THREE_STAGES[-1:])
"""A Llama that a CPU trains in seconds a step: 125M parameters, GPT-2's width and depth, TinyLlama's vocabulary."""
LARGE_STEP = 16
"""Micro-batches of 4 × 256 tokens in a step of 16384."""
STARTS = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """A number and its goal."""

    what: str
    where: str
    value: float
    shown: str
    goal: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        goal = f"{'≥' if self.at_least else '≤'} {self.goal:g}"
        return f"| {self.what} | {self.where} | {self.shown} | {goal} | {'met' if self.met else 'not met'} |"


def main() -> None:
    parser = argparse.ArgumentParser("python -m est_cli.benchmark.goals", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds that are counted")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{machine()}; medians [quartiles], of steps over {arguments.rounds} interleaved rounds\n")
    print("| what | where | measured | goal | |\n|---|---|---|---|---|")
    for name in arguments.only:
        for row in GROUPS[name](arguments.rounds, partial(_tell, name)):
            print(row, flush=True)


def _tell(name: str, done: int, total: int) -> None:
    print(f"{name}: {done} of {total}", end="\n" if done == total else "\r", file=sys.stderr)


def machine() -> str:
    """The processor, its threads, and torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "a CPU")
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def steps(case: Case, precision: str, where: str, rounds: int, progress: Progress) -> Iterator[Row]:
    """Efficiency of every stage, and the full step over the peer's."""
    case = replace(case, precision=precision)
    result = measure(case, rounds, against="transformers", memory=False, progress=progress)
    yield from rows_of_stages(result, f"{where} {precision}")
    yield row_of_peer(result, precision)


def rows_of_stages(result: dict[str, Any], where: str) -> Iterator[Row]:
    """Efficiency of every stage but the last, which is the full model."""
    for stage in result["stages"][:-1]:
        shown = format_interval(stage["efficiency"], stage["efficiency_quartiles"])
        yield Row(f"efficiency of stage {stage['stage']}", where, stage["efficiency"], shown, 1.0, at_least=True)


def row_of_peer(result: dict[str, Any], precision: str) -> Row:
    peer = result["against"]
    shown = format_interval(peer["time_ratio"], peer["time_ratio_quartiles"])
    return Row(f"full step over {peer['name']}'s ({peer['setting']})", precision, peer["time_ratio"], shown, 1.0)


def memory(_: int, progress: Progress) -> Iterator[Row]:
    """Peak memory of the stages over the full model's, each in a process of its own."""
    n = len(THREE_STAGES)
    for done, precision in enumerate(SETTINGS):
        peaks = []
        for index in range(n):
            peaks.append(peak_in_own_process(replace(GPT2, precision=precision), index))
            progress(done * n + index + 1, len(SETTINGS) * n)
        for number, peak in enumerate(peaks[:-1], start=1):
            shown = f"{peak / peaks[-1]:.3f} of {peaks[-1] / 1e9:.2f} GB"
            yield Row(f"peak memory of stage {number}", f"GPT-2 {precision}", peak / peaks[-1], shown, 1.0)


def overhead(_: int, progress: Progress) -> Iterator[Row]:
    """What EST adds to a step of 16384 tokens, in bf16, where the step is shortest.

    Unpacking is part of the optimizer's pass, which is counted as a whole.
    """
    case = replace(GPT2, precision="bf16", grad_accum=LARGE_STEP)
    result = measure(case, rounds=1, warmup=1, memory=False, progress=progress)
    for stage in result["stages"][:-1]:
        sampling, update = (sum(stage["phases"][p] for p in names) / stage["step_s"] for names in _ADDED)
        shown = f"{sampling + update:.2%} (without the optimizer {sampling:.2%})"
        what = f"sample, pack, unpack and optimizer in stage {stage['stage']}, over the step"
        yield Row(what, f"GPT-2 bf16, {case.tokens} tokens", sampling + update, shown, 0.01)


_ADDED = ("sample", "pack"), ("update",)


def start(_: int, progress: Progress) -> Iterator[Row]:
    """Seconds until a command answers."""
    to_first_step()  # prepares the tokens if they are not cached
    progress(1, 3)
    yield _seconds("est-train model=nano, command to first step", [to_first_step() for _ in range(STARTS)], 5.0)
    progress(2, 3)
    helps = [to_help() for _ in range(STARTS)]
    progress(3, 3)
    yield _seconds("est-train --help", helps, 1.0)


def _seconds(what: str, seconds: Sequence[float], goal: float) -> Row:
    found = summary("s", np.array(seconds))
    return Row(what, "seconds", found["s"], format_interval(found["s"], found["s_quartiles"]), goal)


def to_first_step() -> float:
    """Seconds until the first optimizer step is in metrics.jsonl."""
    with TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        command = ["-m", "est_cli", "model=nano", "trainer.max_steps=100", f"hydra.run.dir={metrics.parent}"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"est-train stopped before its first step:\n{process.stderr.read()}")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            process.terminate()
            process.communicate()


def to_help() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "est_cli", "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


GROUPS: dict[str, Callable[[int, Progress], Iterator[Row]]] = {
    "gpt2-fp32": partial(steps, GPT2, "fp32", "GPT-2"),
    "gpt2-bf16": partial(steps, GPT2, "bf16", "GPT-2"),
    "llama-fp32": partial(steps, LLAMA, "fp32", "Llama"),
    "llama-bf16": partial(steps, LLAMA, "bf16", "Llama"),
    "memory": memory,
    "overhead": overhead,
    "start": start,
}


if __name__ == "__main__":
    main()
