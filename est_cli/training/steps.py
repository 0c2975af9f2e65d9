"""Optimizer steps, from their launch to their line of metrics.jsonl.

The device refuses a step that is not finite, and goes on without the host. The host reads a step's loss and norm only
when it logs the step: at once on a CPU, and one step behind on a GPU, which then always has work.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from est_cli.config import TrainConfig
from est_cli.errors import RunFailed
from est_cli.subnet.flops import config_ledger
from est_cli.subnet.plan import Plan, stage_models
from est_cli.subnet.schedule import Stage
from est_cli.training.device import peak_flops
from est_cli.training.distributed import World
from est_cli.training.optimizer import SampledAdamW

Record = dict[str, float | int | None]
"""A line of metrics.jsonl."""
_MOST_UNREAD = 256
"""Steps that are read late at most, even if a run logs seldom."""


class Observer(Protocol):
    """Hears from the loop on rank 0."""

    def log(self, record: Record) -> None: ...

    def say(self, message: str) -> None: ...


@dataclass
class Launched:
    """A step that the device works on; its loss and gradient norm once they are read."""

    number: int
    stage: Stage
    plan: Plan
    lr: float
    loss: float = math.nan
    grad_norm: float = math.nan


class NonFinite(RunFailed):
    """An optimizer step that was not taken."""

    def __init__(self, step: Launched):
        super().__init__(
            f"step {step.number} (stage {step.stage.number}) is not finite: the training loss is {step.loss}, "
            f"the gradient norm {step.grad_norm}"
        )
        self.step = step


class Watch:
    """Losses and gradient norms on their way from the device to the host.

    `stays`: after a step that is not finite the device refuses all later ones too, so the weights are still those
    before it when the host reads it.
    """

    def __init__(self, device: torch.device, stays: bool):
        self.stays = stays
        self.refused = torch.zeros((), device=device)
        """1 if the device must refuse the step."""
        self._unread: list[tuple[Launched, Tensor, torch.cuda.Event | None]] = []

    @property
    def is_full(self) -> bool:
        return len(self._unread) >= _MOST_UNREAD

    def add(self, step: Launched, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Decide on the device whether the step is refused: a scalar tensor, 1 or 0."""
        broken = ((loss + grad_norm) * 0 != 0).to(self.refused.dtype)
        self.refused = torch.maximum(self.refused, broken) if self.stays else broken
        found, event = torch.stack([loss, grad_norm]), None
        if found.is_cuda:
            found = torch.empty(2, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._unread.append((step, found, event))
        return self.refused

    def read(self, end: int) -> list[Launched]:
        """The unread steps before number `end`. Waits for the last of them, not for later ones."""
        n = sum(step.number < end for step, _, _ in self._unread)
        if n == 0:
            return []
        (steps, found, events), self._unread = zip(*self._unread[:n], strict=True), self._unread[n:]
        if events[-1] is not None:
            events[-1].synchronize()
        for step, numbers in zip(steps, torch.stack(found).tolist(), strict=True):
            step.loss, step.grad_norm = numbers
        return list(steps)


@dataclass
class Progress:
    """How far a run has come; its checkpoints hold this beside weights and moments."""

    step: int = 0
    """Steps launched; all of them are done when a checkpoint is written."""
    train_s: float = 0.0
    """Seconds of all steps, without evaluations and checkpoints."""
    val_loss: float | None = None
    val_step: int | None = None
    """Steps done when the validation loss was computed."""
    skipped_steps: int = 0
    """Steps not taken because their loss or gradient was not finite."""

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the block's time to train_s."""
        started = time.perf_counter()
        yield
        self.train_s += time.perf_counter() - started


class Steps:
    """Reads, counts and logs the launched steps of a run."""

    def __init__(self, config: TrainConfig, world: World, optimizer: SampledAdamW, observers: Sequence[Observer]):
        self.config, self.optimizer, self.observers = config, optimizer, observers
        self.progress = Progress()
        self.watch = Watch(world.device, stays=config.trainer.on_nonfinite == "stop")
        self.behind = int(world.device.type == "cuda")
        """Steps that the device has ahead of the one that the host reads."""
        self.ledger, self.joined = config_ledger(config), stage_models(config)
        peak = peak_flops(world.device, config.trainer.precision, config.trainer.peak_flops)
        self.peak = peak and peak * world.size
        self._unlogged: list[Launched] = []
        self._logged = (0, 0.0)
        """Steps, and their seconds in all, at the last log."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state.json; an old one may lack some of it."""
        vars(self.progress).update({key: state[key] for key in vars(self.progress) if key in state})
        self._logged = (self.progress.step, self.progress.train_s)

    def evaluates(self, done: int) -> bool:
        """Whether the model is evaluated after `done` steps."""
        return done == self.config.trainer.max_steps or is_due(done, self.config.trainer.eval_every)

    def _is_logged(self, done: int) -> bool:
        return self.evaluates(done) or done == 1 or is_due(done, self.config.trainer.log_every)

    def read(self) -> None:
        """Read the steps that are logged now. Raises NonFinite."""
        done = self.progress.step
        if self.evaluates(done) or not self.watch.stays:
            self._read(done)
        elif self._is_logged(done - self.behind) or self.watch.is_full:
            self._read(done - self.behind)

    def _read(self, end: int) -> None:
        """Read the steps before `end`, waiting for the device, and tell the optimizer whether each was taken."""
        for step in self.watch.read(end):
            if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
                self.optimizer.confirm()
            else:
                self.optimizer.forget()
                self._skip(NonFinite(step))
            self._unlogged.append(step)

    def _skip(self, refused: NonFinite) -> None:
        """Count a step that was not taken; raises `refused` if the run stops for it."""
        if self.watch.stays:
            self.progress.step = refused.step.number
            raise refused
        self.progress.skipped_steps += 1
        if self.progress.skipped_steps == 1:
            self.say(f"{refused}: skipped (trainer.on_nonfinite=skip); the summary counts all that will be")

    def log(self) -> None:
        """Tell the observers what was read."""
        steps, self._unlogged = self._unlogged, []
        if not steps:
            return
        done, train_s = steps[-1].number + 1, self.progress.train_s
        step_s = (train_s - self._logged[1]) / (done - self._logged[0])
        self._logged = done, train_s
        for step in steps:
            if self._is_logged(step.number + 1):
                record = self._record(step, step_s)
                for observer in self.observers:
                    observer.log(record)

    def settle(self) -> None:
        """Read and log everything that was launched. Raises NonFinite."""
        with self.progress.timed():
            self._read(self.progress.step)
        self.log()

    def say(self, message: str) -> None:
        for observer in self.observers:
            observer.say(message)

    def _record(self, step: Launched, step_s: float) -> Record:
        """The keys of metrics.jsonl; `step_s` is the mean seconds of a step since the last log."""
        config, full, plan, stage = self.config, self.config.model, step.plan, step.stage.number - 1
        done, joined = step.number + 1, self.joined[stage]
        record = {
            "step": step.number,
            "tokens": done * config.tokens_per_step,
            "stage": step.stage.number,
            "train/loss": step.loss,
            "train/lr": step.lr,
            "train/grad_norm": step.grad_norm,
            "val/loss": self.progress.val_loss if self.progress.val_step == done else None,
            "subnet/heads": plan.heads.shape[1] / full.n_heads,
            "subnet/mlp": plan.neurons.shape[1] / full.d_ff,
            "subnet/layers": len(plan.layers) / full.n_layers,
        }
        if any(part != full for part in self.joined):
            record |= {
                "grown/heads": joined.n_heads / full.n_heads,
                "grown/mlp": joined.d_ff / full.d_ff,
                "grown/layers": joined.n_layers / full.n_layers,
            }
        return {
            **record,
            **self.ledger.record(step.number),
            "perf/step_s": step_s,
            "perf/tokens_per_s": config.tokens_per_step / step_s,
            "perf/mfu": self.ledger.per_step[stage].total / step_s / self.peak if self.peak else None,
        }


def is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
