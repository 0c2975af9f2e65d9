"""python -m est_cli.benchmark.goals: this CPU's numbers, each beside its goal; about a quarter of an hour on two cores.

Needs transformers (the peer) and rich beside torch and numpy. Goals that need a GPU are not measured here;
docs/performance.md has them and the command.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from est_cli.benchmark.arguments import PRESETS, THREE_STAGES
from est_cli.benchmark.case import Case
from est_cli.benchmark.measure import QUARTILES, measure, peak_in_own_process
from est_cli.benchmark.peer import SETTINGS
from est_cli.config import ModelConfig, OptimizerConfig, SamplingConfig
from est_cli.subnet.schedule import StageSpec
from est_cli.units import format_interval

GPT2 = ModelConfig(**PRESETS["gpt2"])
LLAMA = replace(
    ModelConfig(**PRESETS["tinyllama"]),
    n_layers=12,
    n_heads=12,
    n_kv_heads=4,
    d_model=768,
    head_dim=64,
    d_ff=2048,
    max_seq_len=1024,
)
"""A Llama that a CPU trains in seconds a step: 125M parameters, GPT-2's width and depth, TinyLlama's vocabulary."""
STAGES = tuple(StageSpec(**stage) for stage in THREE_STAGES)
LARGE_STEP = 16
"""Micro-batches of 4 × 256 tokens in a step of 16384."""
STARTS = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """A line of the table: a number and what it should be."""

    what: str
    where: str
    value: float
    shown: str
    goal: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def main() -> None:
    parser = argparse.ArgumentParser("python -m est_cli.benchmark.goals", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds that are counted")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from rich.console import Console
    from rich.progress import Progress as Bar

    rows: list[Row] = []
    with Bar(console=Console(stderr=True), transient=True) as bar:
        for name in arguments.only:
            task = bar.add_task(name, total=None)
            advance = lambda done, total, task=task: bar.update(task, completed=done, total=total)  # noqa: E731
            rows += GROUPS[name](arguments.rounds, advance)
    _print(rows, arguments.rounds, Console())


def _print(rows: Sequence[Row], rounds: int, console: Any) -> None:
    from rich.table import Table

    table = Table(
        title=f"{machine()}; medians [quartiles], of steps over {rounds} interleaved rounds", title_justify="left"
    )
    for column in ("what", "where", "measured", "goal", ""):
        table.add_column(column, justify="right" if column in ("measured", "goal") else "left")
    for row in rows:
        goal = f"{'≥' if row.at_least else '≤'} {row.goal:g}"
        table.add_row(row.what, row.where, row.shown, goal, "met" if row.met else "not met")
    console.print(table)


def machine() -> str:
    """The processor, its threads, and torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else "a CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def gpt2(precision: str, rounds: int, progress: Progress) -> Iterator[Row]:
    """Efficiency and the peer, GPT-2 124M, 4 × 256 tokens."""
    case = _case(GPT2, precision, STAGES)
    result = measure(case, rounds, against="transformers", memory=False, progress=progress)
    yield from rows_of_stages(result, f"GPT-2 {precision}")
    yield row_of_peer(result, precision)


def llama(precision: str, rounds: int, progress: Progress) -> Iterator[Row]:
    """The peer beside the full model."""
    case = _case(LLAMA, precision, STAGES[-1:])
    yield row_of_peer(measure(case, rounds, against="transformers", memory=False, progress=progress), precision)


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
    done = 0
    for precision in SETTINGS:
        peaks = []
        for index in range(len(STAGES)):
            peaks.append(peak_in_own_process(_case(GPT2, precision, STAGES), index))
            progress(done := done + 1, len(SETTINGS) * len(STAGES))
        for number, peak in enumerate(peaks[:-1], start=1):
            shown = f"{peak / peaks[-1]:.3f} of {peaks[-1] / 1e9:.2f} GB"
            yield Row(f"peak memory of stage {number}", f"GPT-2 {precision}", peak / peaks[-1], shown, 1.0)


def overhead(_: int, progress: Progress) -> Iterator[Row]:
    """What EST adds to a step of 16384 tokens, in bf16, where the step is shortest.

    Unpacking is a part of the optimizer's pass; the whole of that pass is counted.
    """
    case = _case(GPT2, "bf16", STAGES, grad_accum=LARGE_STEP)
    result = measure(case, rounds=1, warmup=1, memory=False, progress=progress)
    for stage in result["stages"][:-1]:
        phases = stage["phases"]
        share = (phases["sample"] + phases["pack"] + phases["update"]) / stage["step_s"]
        sampling = (phases["sample"] + phases["pack"]) / stage["step_s"]
        shown = f"{share:.2%} (without the optimizer {sampling:.2%})"
        what = f"sample, pack, unpack and optimizer in stage {stage['stage']}, over the step"
        yield Row(what, f"GPT-2 bf16, {case.tokens} tokens", share, shown, 0.01)


def start(_: int, progress: Progress) -> Iterator[Row]:
    """Seconds until a command answers."""
    to_first_step()  # prepares the tokens where they are not cached
    progress(1, 3)
    yield _seconds("est-train model=nano, command to first step", [to_first_step() for _ in range(STARTS)], 5.0)
    progress(2, 3)
    yield _seconds("est-train --help", [to_help() for _ in range(STARTS)], 1.0)


def to_first_step() -> float:
    """Seconds until the first optimizer step stands in metrics.jsonl."""
    with TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        command = ["model=nano", "trainer.max_steps=100", f"hydra.run.dir={metrics.parent}"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "est_cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
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
    "gpt2-fp32": lambda rounds, progress: gpt2("fp32", rounds, progress),
    "gpt2-bf16": lambda rounds, progress: gpt2("bf16", rounds, progress),
    "llama-fp32": lambda rounds, progress: llama("fp32", rounds, progress),
    "llama-bf16": lambda rounds, progress: llama("bf16", rounds, progress),
    "memory": memory,
    "overhead": overhead,
    "start": start,
}


def _case(model: ModelConfig, precision: str, stages: Sequence[StageSpec], grad_accum: int = 1) -> Case:
    return Case(
        model, SamplingConfig(), OptimizerConfig(), tuple(stages), 4, 256, grad_accum=grad_accum, precision=precision
    )


def _seconds(what: str, seconds: Sequence[float], goal: float) -> Row:
    median = float(np.median(seconds))
    return Row(what, "seconds", median, format_interval(median, np.percentile(seconds, QUARTILES)), goal)


if __name__ == "__main__":
    main()
