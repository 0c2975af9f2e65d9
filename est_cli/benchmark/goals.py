"""python -m est_cli.benchmark.goals: this CPU's numbers beside their goals; about nine minutes on two cores.

Needs transformers (the peer) beside torch and numpy. docs/performance.md has the goals that need a GPU.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from est_cli.benchmark.case import PRESETS, THREE_STAGES, Case
from est_cli.benchmark.measure import (
    Cells,
    Progress,
    in_own_process,
    interleaved,
    machine,
    markdown,
    measure,
    peak_of_stage,
    progress_line,
    shown,
    summary,
)
from est_cli.benchmark.peer import SETTINGS

GPT2 = Case(PRESETS["gpt2"])
_SIZES = {"n_layers": 12, "n_heads": 12, "n_kv_heads": 4, "d_model": 768, "head_dim": 64, "d_ff": 2048}
LLAMA = Case(replace(PRESETS["tinyllama"], **_SIZES, max_seq_len=1024), stages=THREE_STAGES[-1:])
"""A Llama that a CPU trains in seconds a step: 125M parameters, GPT-2's width and depth, TinyLlama's vocabulary."""
LARGE_STEP = 16
"""Micro-batches of 4 × 256 tokens in a step of 16384."""
STARTS = 5


def main() -> None:
    parser = argparse.ArgumentParser("python -m est_cli.benchmark.goals", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds that are counted")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{machine('cpu')}; medians [quartiles], of steps over {arguments.rounds} interleaved rounds\n")
    first = 0
    for name in arguments.only:
        for row in GROUPS[name](arguments.rounds, progress_line(name)):
            print(*markdown([row])[first:], sep="\n", flush=True)
            first = 2


def beside_goal(what: str, where: str, value: float, text: str, goal: float = 1.0, at_least: bool = False) -> Cells:
    """A number, which `text` shows, and its goal."""
    met = value >= goal if at_least else value <= goal
    goal_text = f"{'≥' if at_least else '≤'} {goal:g}"
    return {"what": what, "where": where, "measured": text, "goal": goal_text, "": "met" if met else "not met"}


def steps(case: Case, where: str, rounds: int, progress: Progress) -> Iterator[Cells]:
    """Efficiency of every stage but the full model's, which has none, and the full step over the peer's."""
    result = measure(case, rounds, against="transformers", memory=False, progress=progress)
    for stage in result["stages"][:-1]:
        what, text = f"efficiency of stage {stage['stage']}", shown(stage, "efficiency")
        yield beside_goal(what, f"{where} {case.precision}", stage["efficiency"], text, at_least=True)
    peer = result["against"]
    what = f"full step over {peer['name']}'s ({peer['setting']})"
    yield beside_goal(what, case.precision, peer["time_ratio"], shown(peer, "time_ratio"))


def memory(_: int, progress: Progress) -> Iterator[Cells]:
    """Peak memory of the stages over the full model's, each in a process of its own."""
    for precision in SETTINGS:
        case = replace(GPT2, precision=precision)
        calls = {index: partial(in_own_process, peak_of_stage, case, index) for index in range(len(case.stages))}
        *sampled, full = (peak for [peak] in interleaved(calls, 1, progress=progress).values())
        for number, peak in enumerate(sampled, start=1):
            text = f"{peak / full:.3f} of {full / 1e9:.2f} GB"
            yield beside_goal(f"peak memory of stage {number}", f"GPT-2 {precision}", peak / full, text)


def overhead(_: int, progress: Progress) -> Iterator[Cells]:
    """What EST adds to a step of 16384 tokens, in bf16, where the step is shortest.

    Unpacking is part of the optimizer's pass, which is counted as a whole.
    """
    case = replace(GPT2, precision="bf16", grad_accum=LARGE_STEP)
    result = measure(case, rounds=1, warmup=1, memory=False, progress=progress)
    for stage in result["stages"][:-1]:
        phases = {phase: seconds / stage["step_s"] for phase, seconds in stage["phases"].items()}
        sampling = phases["sample"] + phases["pack"]
        total = sampling + phases["update"]
        what = f"sample, pack, unpack and optimizer in stage {stage['stage']}, over the step"
        text = f"{total:.2%} (without the optimizer {sampling:.2%})"
        yield beside_goal(what, f"GPT-2 bf16, {case.tokens} tokens", total, text, 0.01)


def start(_: int, progress: Progress) -> Iterator[Cells]:
    """Seconds until a command answers; the first round prepares the tokens if they are not cached."""
    calls = {
        ("est-train model=nano, command to first step", 5.0): seconds_to_first_step,
        ("est-train --help", 1.0): seconds_to_help,
    }
    for (what, goal), seconds in interleaved(calls, STARTS, 1, progress).items():
        found = summary("s", seconds)
        yield beside_goal(what, "seconds", found["s"], shown(found, "s"), goal)


def seconds_to_first_step() -> float:
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


def seconds_to_help() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "est_cli", "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


GROUPS: dict[str, Callable[[int, Progress], Iterator[Cells]]] = {
    "gpt2-fp32": partial(steps, GPT2, "GPT-2"),
    "gpt2-bf16": partial(steps, replace(GPT2, precision="bf16"), "GPT-2"),
    "llama-fp32": partial(steps, LLAMA, "Llama"),
    "llama-bf16": partial(steps, replace(LLAMA, precision="bf16"), "Llama"),
    "memory": memory,
    "overhead": overhead,
    "start": start,
}


if __name__ == "__main__":
    main()
