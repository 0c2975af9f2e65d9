"""Rounds of interleaved calls, and what the times of steps say about time against FLOPs.

efficiency = (1 − t_stage/t_full) / (1 − flops_stage/flops_full): 1 means that a stage saves as much time as
FLOPs. Ratios are taken within a round, so a machine that slows down slows both sides.
"""

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
import torch

from est_cli.benchmark.case import Case
from est_cli.benchmark.peer import fastest, find_peer
from est_cli.benchmark.steps import PHASES, Stepper
from est_cli.training.device import cpu_name, keep_freed_memory, peak_flops, peak_memory_bytes, reset_peak_memory
from est_cli.units import format_bytes, format_clock, format_flops, format_interval, format_percent, format_step_time

Name, Result = TypeVar("Name"), TypeVar("Result")
Progress = Callable[[int, int], None]
"""Is told how many of how many calls are done."""
Cells = dict[str, str]
"""A line of a table: column → text."""


def interleaved(
    calls: Mapping[Name, Callable[[], Result]],
    rounds: int,
    warmup: int = 0,
    progress: Progress = lambda done, total: None,
) -> dict[Name, list[Result]]:
    """What each call returned in each round, A B C A B C; rounds of `warmup` come first and are not counted."""
    found: dict[Name, list[Result]] = {name: [] for name in calls}
    turns = [name for _ in range(warmup + rounds) for name in calls]
    for done, name in enumerate(turns):
        progress(done, len(turns))
        found[name].append(calls[name]())
    progress(len(turns), len(turns))
    return {name: results[warmup:] for name, results in found.items()}


def progress_line(name: str) -> Progress:
    """Says on standard error how far `name` is, and about how long the rest takes."""
    began = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal began
        now = time.perf_counter()
        began = began if done else now
        taken = now - began
        left = f"about {format_clock(taken * (total - done) / done)} left" if done else "begins"
        text = f"{name}: {done} of {total}, {left if done < total else f'took {format_clock(taken)}'}"
        if sys.stderr.isatty():
            print(f"{text:<60}", end="\n" if done == total else "\r", file=sys.stderr, flush=True)
        elif 10 * done // total != 10 * (done - 1) // total:  # a log gets ten lines
            print(text, file=sys.stderr, flush=True)

    return tell


def measure(
    case: Case,
    rounds: int = 9,
    warmup: int = 2,
    against: str | None = None,
    against_path: str | None = None,
    memory: bool = True,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The contract's JSON of est-bench: medians over rounds, per-round ratios, and their quartiles.

    `against` names an entry of peer.PEERS. Raises UserError if it cannot be used.
    """
    code = find_peer(against, against_path, case) if against else None
    keep_freed_memory()
    stepper, stages = Stepper(case), range(len(case.stages))
    calls: dict[int | str, Callable[[], Any]] = {index: partial(stepper.step, index) for index in stages}
    peer = fastest(case, code, warmup) if code else None
    if peer is not None:
        calls["peer"] = peer.step
    times = interleaved(calls, rounds, warmup, progress)
    seconds = np.array([[list(phases.values()) for phases in times[index]] for index in stages])
    result: dict[str, Any] = {"stages": [_stage(case, seconds, index) for index in stages]}
    if peer is not None:
        how = "compiled" if case.compile else "eager"
        result["against"] = {
            "name": peer.code.name,
            "setting": f"{peer.setting}, SDPA, no cache, fused AdamW, {torch.get_num_threads()} threads, {how}",
            "step_s": float(np.median(times["peer"])),
            **summary("time_ratio", seconds[-1].sum(-1) / times["peer"]),
        }
    if memory:
        del stepper, peer, calls
        if case.device == "cuda":  # the processes that follow need it
            gc.collect()
            torch.cuda.empty_cache()
        for index in stages:
            result["stages"][index]["peak_memory_bytes"] = in_own_process(peak_of_stage, case, index)
    return result


def summary(name: str, values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """The median under `name`, and the quartiles beside it."""
    return {name: float(np.median(values)), f"{name}_quartiles": np.percentile(values, (25, 75)).tolist()}


def _stage(case: Case, seconds: np.ndarray, index: int) -> dict[str, Any]:
    """seconds [stages, rounds, phases]; the last stage is the full model."""
    totals, flops = seconds.sum(-1), [cost.total for cost in case.flops]
    time_ratios, flops_ratio = totals[index] / totals[-1], flops[index] / flops[-1]
    peak = peak_flops(torch.device(case.device), case.precision, case.peak_flops)
    efficiency = {"efficiency": None, "efficiency_quartiles": None}
    if flops_ratio < 1:
        efficiency = summary("efficiency", (1 - time_ratios) / (1 - flops_ratio))
    return {
        "stage": index + 1,
        "rates": asdict(case.stages[index].rates),
        "grown": asdict(case.stages[index].grown),
        **summary("step_s", totals[index]),
        "phases": dict(zip(PHASES, np.median(seconds[index], axis=0).tolist(), strict=True)),
        "flops": flops[index],
        **summary("time_ratio", time_ratios),
        "flops_ratio": flops_ratio,
        **efficiency,
        "peak_memory_bytes": None,
        "mfu": flops[index] / float(np.median(totals[index])) / peak if peak else None,
    }


def machine(device: str) -> str:
    """What numbers depend on: the device, the threads of a CPU, and torch."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def stage_cells(stage: Mapping[str, Any]) -> Cells:
    """One of the `stages` of `measure`."""
    return {
        "stage": str(stage["stage"]),
        "time": format_step_time(stage["step_s"]),
        "FLOPs": format_flops(stage["flops"]),
        "time / full": shown(stage, "time_ratio"),
        "FLOPs / full": f"{stage['flops_ratio']:.3f}",
        "efficiency": shown(stage, "efficiency"),
        "peak memory": format_bytes(stage["peak_memory_bytes"]),
        "MFU": format_percent(stage["mfu"]),
    }


def shown(facts: Mapping[str, Any], name: str) -> str:
    """A `summary` as text: `0.95 [0.93, 0.97]`."""
    return format_interval(facts[name], facts[f"{name}_quartiles"])


def markdown(rows: Sequence[Cells]) -> list[str]:
    """The lines of a table; the first two are its head."""
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], *(row.values() for row in rows))]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def in_own_process(function: Callable[..., Result], *arguments: Any, timeout: float | None = None) -> Result:
    """What the function returns in a fresh process.

    Raises what the function raises, TimeoutError, and RuntimeError if the process is killed.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(timeout) else TimeoutError()
    except EOFError:
        result = RuntimeError("the process was killed")
    if isinstance(result, TimeoutError):
        process.kill()
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send_result(sender: Connection, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(error)


def peak_of_stage(case: Case, index: int) -> int:
    """Peak memory of this process, which should be a fresh one, over two steps of one stage."""
    keep_freed_memory()
    stepper, device = Stepper(case), torch.device(case.device)
    reset_peak_memory(device)
    for _ in range(2):
        stepper.step(index)
    return peak_memory_bytes(device)
