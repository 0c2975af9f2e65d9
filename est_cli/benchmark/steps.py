"""Optimizer steps of every stage, taken apart into phases: what each phase takes, and how many operations it launches.

An operation is one call of PyTorch's dispatcher, forward or backward, that is not a view: what a GPU's host must
launch, counted on any machine. The number depends on layers and stages, not on widths, so the model is counted at small
widths: at full width a CPU cuts pack and optimizer into pieces that fit its cache, which do not count.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from est_cli.benchmark.case import Case
from est_cli.kernels.dispatch import kernels_for
from est_cli.model.transformer import Transformer, initialise
from est_cli.subnet.plan import stage_subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Stage
from est_cli.training.optimizer import SampledAdamW
from est_cli.training.steps import Launched, Watch
from est_cli.training.subnetwork import DTYPES, MaskedSubnetwork, PackedSubnetwork

PHASES = ("sample", "pack", "forward", "backward", "update")
_MANY_STEPS = 1 << 30
_HEAD_DIM, _BLOCKS, _VOCABULARY, _TOKENS = 2, 8, 64, 8
"""The small widths."""
_COPIES_NOTHING = {"aten::_unsafe_view", "aten::_reshape_alias"}
"""Views that the dispatcher does not mark as such."""


def device_time(device: str) -> float:
    """Seconds on the clock when the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
        stage = Stage(index + 1, 0, _MANY_STEPS, spec.rates, spec.grown)
        clock, last = dict.fromkeys(PHASES, 0.0), self.now()

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
        refused = self.watch.add(Launched(self.steps, stage, plan, case.optimizer.lr), loss.detach(), norm)
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
            self.subnetworks[index] = kind(self.model, shape, DTYPES[case.precision])
            if case.compile:
                self.subnetworks[index].module.compile_blocks()
        return self.subnetworks[index]


class Operations(TorchDispatchMode):
    """`names` are the operations called under it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name().split(".")[0] not in _COPIES_NOTHING:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def count_operations(case: Case) -> dict[str, Any]:
    """Operations of one optimizer step of every stage: pack; forward and backward; norm, clip and AdamW."""
    widths = {"d_model": _HEAD_DIM * case.model.n_heads, "d_ff": _BLOCKS * case.sampling.mlp_block}
    widths |= {"head_dim": _HEAD_DIM, "vocab_size": _VOCABULARY, "max_seq_len": _TOKENS}
    narrow = replace(case, model=replace(case.model, **widths), batch_size=1, seq_len=_TOKENS)
    stages = []
    with Operations() as operations:
        stepper = Stepper(narrow, now=lambda: len(operations.names))
        for index in range(len(case.stages)):
            stepper.step(index)  # what only the first step of a stage allocates
            found = {phase: int(count) for phase, count in stepper.step(index).items()}
            found["forward_backward"] = found["forward"] + found["backward"]
            stages.append({"stage": index + 1, **{key: found[key] for key in ("pack", "forward_backward", "update")}})
    return {"stages": stages}
