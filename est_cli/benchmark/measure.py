"""Rounds of interleaved steps, and what they say about time against FLOPs.

efficiency = (1 − t_stage/t_full) / (1 − flops_stage/flops_full): 1 means that a stage saves as much time as
FLOPs. Ratios are taken within a round, so that a machine that slows down slows both sides.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from est_cli.benchmark.case import PHASES, Case
from est_cli.benchmark.peer import Peer, fastest, find_peer
from est_cli.benchmark.stepper import Stepper
from est_cli.training.device import keep_freed_memory, peak_flops, peak_memory_bytes, reset_peak_memory

QUARTILES = (25, 75)


def measure(
    case: Case,
    rounds: int = 9,
    warmup: int = 2,
    against: str | None = None,
    against_path: str | None = None,
    memory: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The contract's JSON of est-bench: medians over rounds, per-round ratios, and their quartiles.

    `against` names an entry of peer.PEERS. Raises UserError where it is not to be had.
    """
    code = find_peer(against, against_path, case) if against else None
    keep_freed_memory()
    stepper = Stepper(case)
    peer = fastest(case, code, warmup) if code else None
    stages = range(len(case.stages))
    seconds = np.zeros((rounds, len(case.stages), len(PHASES)))
    peer_seconds = np.zeros(rounds)
    for number in range(-warmup, rounds):
        progress(number + warmup, rounds + warmup)
        for index in stages:
            clock = stepper.step(index)
            if number >= 0:
                seconds[number, index] = [clock[phase] for phase in PHASES]
        if peer is not None:
            elapsed = peer.step()
            if number >= 0:
                peer_seconds[number] = elapsed
    progress(rounds + warmup, rounds + warmup)
    result: dict[str, Any] = {"stages": [_stage(case, seconds, index) for index in stages]}
    if peer is not None:
        result["against"] = _against(case, peer, seconds[:, -1].sum(-1), peer_seconds)
    if memory:
        del stepper, peer
        if case.device == "cuda":  # the processes that follow need it
            gc.collect()
            torch.cuda.empty_cache()
        for index in stages:
            result["stages"][index]["peak_memory_bytes"] = peak_in_own_process(case, index)
    return result


def _stage(case: Case, seconds: np.ndarray, index: int) -> dict[str, Any]:
    """seconds [rounds, stages, phases]; the last stage is the full model."""
    totals, flops = seconds.sum(-1), [cost.total for cost in case.flops]
    time_ratios, flops_ratio = totals[:, index] / totals[:, -1], flops[index] / flops[-1]
    efficiencies = (1 - time_ratios) / (1 - flops_ratio) if flops_ratio < 1 else None
    step_s = float(np.median(totals[:, index]))
    peak = peak_flops(torch.device(case.device), case.precision, case.peak_flops)
    return {
        "stage": index + 1,
        "rates": asdict(case.stages[index].rates),
        "grown": asdict(case.stages[index].grown),
        "step_s": step_s,
        "step_s_quartiles": np.percentile(totals[:, index], QUARTILES).tolist(),
        "phases": {phase: float(np.median(seconds[:, index, i])) for i, phase in enumerate(PHASES)},
        "flops": flops[index],
        "time_ratio": float(np.median(time_ratios)),
        "time_ratio_quartiles": np.percentile(time_ratios, QUARTILES).tolist(),
        "flops_ratio": flops_ratio,
        "efficiency": None if efficiencies is None else float(np.median(efficiencies)),
        "efficiency_quartiles": None if efficiencies is None else np.percentile(efficiencies, QUARTILES).tolist(),
        "peak_memory_bytes": None,
        "mfu": flops[index] / step_s / peak if peak else None,
    }


def _against(case: Case, peer: Peer, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    ratios = ours / theirs
    return {
        "name": peer.code.name,
        "setting": f"{peer.setting}, SDPA, no cache, fused AdamW, {torch.get_num_threads()} threads, "
        + ("compiled" if case.compile else "eager"),
        "step_s": float(np.median(theirs)),
        "time_ratio": float(np.median(ratios)),
        "time_ratio_quartiles": np.percentile(ratios, QUARTILES).tolist(),
    }


def peak_in_own_process(case: Case, index: int) -> int:
    """Peak memory of one stage alone, in a fresh process."""
    from est_cli.benchmark.arguments import to_arguments

    command = [sys.executable, "-m", "est_cli.benchmark", *to_arguments(case), "--peak-memory-of-stage", str(index + 1)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of stage {index + 1} failed:\n{done.stderr}")
    return json.loads(done.stdout)["peak_memory_bytes"]


def peak_of_stage(case: Case, index: int, steps: int = 2) -> int:
    """Peak memory of this process over a few steps of one stage."""
    keep_freed_memory()
    stepper = Stepper(case)
    device = torch.device(case.device)
    reset_peak_memory(device)
    for _ in range(steps):
        stepper.step(index)
    return peak_memory_bytes(device)
