"""One stage's optimizer step, phase by phase: the calls of the training loop, with a clock between them."""

import time
from collections.abc import Callable

import torch

from est_cli.benchmark.case import PHASES, Case, Clock
from est_cli.kernels.dispatch import kernels_for
from est_cli.model.initialisation import initialise
from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import stage_subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Stage
from est_cli.training.optimizer import SampledAdamW
from est_cli.training.subnetwork import DTYPES, MaskedSubnetwork, PackedSubnetwork
from est_cli.training.watch import Launched, Watch

_MANY_STEPS = 1 << 30


class Stepper:
    """Steps of all stages on one master model, as a run takes them one after the other.

    `now` is what is read between the phases: seconds, where nothing else is given.
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

    def step(self, index: int) -> Clock:
        """One optimizer step of the stage at `index`; what each phase took."""
        case = self.case
        subnet = self._subnetwork(index)
        spec = case.stages[index]
        stage = Stage(index + 1, 0, _MANY_STEPS, spec.rates, spec.grown)
        marks = [self.now()]
        plan = sample(case.seed, self.steps, stage, case.model, case.sampling)
        marks.append(self.now())
        subnet.load(plan)
        marks.append(self.now())
        forward = backward = 0.0
        for _ in range(case.grad_accum):
            start = self.now()
            loss = subnet.loss(*self.batch) / case.grad_accum
            middle = self.now()
            loss.backward()
            end = self.now()
            forward, backward = forward + middle - start, backward + end - middle
        start = self.now()
        updates = subnet.updates()
        norm = self.optimizer.norm(updates)
        refused = self.watch.see(Launched(self.steps, stage, plan, case.optimizer.lr), loss.detach(), norm)
        self.optimizer.step(updates, case.optimizer.lr, norm, refused)
        end = self.now()
        self.steps += 1
        self.watch.read(self.steps)
        self.optimizer.confirm()
        seconds = (marks[1] - marks[0], marks[2] - marks[1], forward, backward, end - start)
        return dict(zip(PHASES, seconds, strict=True))

    def _subnetwork(self, index: int) -> PackedSubnetwork | MaskedSubnetwork:
        if index not in self.subnetworks:
            case = self.case
            kind = MaskedSubnetwork if case.kernels == "masked" else PackedSubnetwork
            shape = stage_subnetwork(case.model, case.sampling, case.stages[index])
            subnet = self.subnetworks[index] = kind(self.model, shape, DTYPES[case.precision])
            if case.compile:
                subnet.module.compile_blocks()
        return self.subnetworks[index]


def device_time(device: str) -> float:
    """Seconds, once the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
