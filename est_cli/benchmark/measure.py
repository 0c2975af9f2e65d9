"""Rounds of interleaved steps, and what they say about time against FLOPs.

efficiency = (1 − t_stage/t_full) / (1 − flops_stage/flops_full): 1 means that a stage saves as much time as
FLOPs. Ratios are taken within a round, so a machine that slows down slows both sides.
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

from est_cli.benchmark.case import Case
from est_cli.benchmark.peer import Peer, device_time, fastest, find_peer
from est_cli.kernels.dispatch import kernels_for
from est_cli.model.transformer import Transformer, initialise
from est_cli.subnet.plan import stage_subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Stage
from est_cli.training.device import keep_freed_memory, peak_flops, peak_memory_bytes, reset_peak_memory
from est_cli.training.optimizer import SampledAdamW
from est_cli.training.subnetwork import DTYPES, MaskedSubnetwork, PackedSubnetwork
from est_cli.training.watch import Launched, Watch

PHASES = ("sample", "pack", "forward", "backward", "update")
_QUARTILES = (25, 75)
_MANY_STEPS = 1 << 30


class Stepper:
    """Steps of all stages on one master model: the calls of the training loop, with a clock between them.

    `now` is read between the phases: seconds by default.
    """

    def __init__(self, case: Case, now: Callable[[], float] | None = None):
        self.case = case
        self.now = now or (lambda: device_time(case.device))
        model = Transformer(case.model, recompute=case.recompute, kernels=kernels_for(case.kernels, case.device))
        self.model = initialise(model, case.seed).to(case.device)
        self.optimizer = SampledAdamW(self.model, case.optimizer)
        self.watch = Watch(torch.device(case.device), stays=True)
        self.batch = case.batch()
        self.subnetworks: dict[int, PackedSubnetwork | MaskedSubnetwork] = {}
        self.steps = 0

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step of the stage at `index`; what each phase took."""
        case, spec, subnet = self.case, self.case.stages[index], self._subnetwork(index)
        stage, clock, last = (
            Stage(index + 1, 0, _MANY_STEPS, spec.rates, spec.grown),
            dict.fromkeys(PHASES, 0.0),
            self.now(),
        )

        def lap(phase: str) -> None:
            nonlocal last
            began, last = last, self.now()
            clock[phase] += last - began

        plan = sample(case.seed, self.steps, stage, case.model, case.sampling)
        lap("sample")
        subnet.load(plan)
        lap("pack")
        for _ in range(case.grad_accum):
            loss = subnet.loss(*self.batch) / case.grad_accum
            lap("forward")
            loss.backward()
            lap("backward")
        updates = subnet.updates()
        norm = self.optimizer.norm(updates)
        refused = self.watch.see(Launched(self.steps, stage, plan, case.optimizer.lr), loss.detach(), norm)
        self.optimizer.step(updates, case.optimizer.lr, norm, refused)
        lap("update")
        self.steps += 1
        self.watch.read(self.steps)
        self.optimizer.confirm()
        return clock

    def _subnetwork(self, index: int) -> PackedSubnetwork | MaskedSubnetwork:
        if index not in self.subnetworks:
            case = self.case
            kind = MaskedSubnetwork if case.kernels == "masked" else PackedSubnetwork
            shape = stage_subnetwork(case.model, case.sampling, case.stages[index])
            subnet = self.subnetworks[index] = kind(self.model, shape, DTYPES[case.precision])
            if case.compile:
                subnet.module.compile_blocks()
        return self.subnetworks[index]


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

    `against` names an entry of peer.PEERS. Raises UserError if it cannot be used.
    """
    code = find_peer(against, against_path, case) if against else None
    keep_freed_memory()
    stepper = Stepper(case)
    peer = fastest(case, code, warmup) if code else None
    stages = range(len(case.stages))
    ours, theirs = [], []
    for number in range(warmup + rounds):
        progress(number, rounds + warmup)
        ours.append([list(stepper.step(index).values()) for index in stages])
        if peer is not None:
            theirs.append(peer.step())
    progress(rounds + warmup, rounds + warmup)
    seconds = np.array(ours[warmup:])
    result: dict[str, Any] = {"stages": [_stage(case, seconds, index) for index in stages]}
    if peer is not None:
        result["against"] = _against(case, peer, seconds[:, -1].sum(-1), np.array(theirs[warmup:]))
    if memory:
        del stepper, peer
        if case.device == "cuda":  # the processes that follow need it
            gc.collect()
            torch.cuda.empty_cache()
        for index in stages:
            result["stages"][index]["peak_memory_bytes"] = peak_in_own_process(case, index)
    return result


def summary(name: str, values: np.ndarray) -> dict[str, Any]:
    """The median under `name`, and the quartiles beside it."""
    return {name: float(np.median(values)), f"{name}_quartiles": np.percentile(values, _QUARTILES).tolist()}


def _stage(case: Case, seconds: np.ndarray, index: int) -> dict[str, Any]:
    """seconds [rounds, stages, phases]; the last stage is the full model."""
    totals, flops = seconds.sum(-1), [cost.total for cost in case.flops]
    time_ratios, flops_ratio = totals[:, index] / totals[:, -1], flops[index] / flops[-1]
    peak = peak_flops(torch.device(case.device), case.precision, case.peak_flops)
    efficiency = {"efficiency": None, "efficiency_quartiles": None}
    if flops_ratio < 1:
        efficiency = summary("efficiency", (1 - time_ratios) / (1 - flops_ratio))
    return {
        "stage": index + 1,
        "rates": asdict(case.stages[index].rates),
        "grown": asdict(case.stages[index].grown),
        **summary("step_s", totals[:, index]),
        "phases": dict(zip(PHASES, np.median(seconds[:, index], axis=0).tolist(), strict=True)),
        "flops": flops[index],
        **summary("time_ratio", time_ratios),
        "flops_ratio": flops_ratio,
        **efficiency,
        "peak_memory_bytes": None,
        "mfu": flops[index] / float(np.median(totals[:, index])) / peak if peak else None,
    }


def _against(case: Case, peer: Peer, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    how = "compiled" if case.compile else "eager"
    return {
        "name": peer.code.name,
        "setting": f"{peer.setting}, SDPA, no cache, fused AdamW, {torch.get_num_threads()} threads, {how}",
        "step_s": float(np.median(theirs)),
        **summary("time_ratio", ours / theirs),
    }


def peak_in_own_process(case: Case, index: int) -> int:
    """Peak memory of one stage, in a fresh process."""
    command = ["-m", "est_cli.benchmark", "--case", json.dumps(asdict(case)), "--peak-memory-of-stage", str(index + 1)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of stage {index + 1} failed:\n{done.stderr}")
    return json.loads(done.stdout)["peak_memory_bytes"]


def peak_of_stage(case: Case, index: int, steps: int = 2) -> int:
    """Peak memory of this process over a few steps of one stage."""
    keep_freed_memory()
    stepper, device = Stepper(case), torch.device(case.device)
    reset_peak_memory(device)
    for _ in range(steps):
        stepper.step(index)
    return peak_memory_bytes(device)
