"""Whether a step is finite: decided on the device, which refuses it, and read by the host when it wants to know."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from est_cli.subnet.plan import Plan
from est_cli.subnet.schedule import Stage


@dataclass
class Launched:
    """A step that the device was asked for; its loss and gradient norm, once they are read."""

    number: int
    stage: Stage
    plan: Plan
    lr: float
    loss: float = math.nan
    grad_norm: float = math.nan

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


_MOST_UNREAD = 256


class Watch:
    """What the steps found, for the host to read when it wants to know; the device needs no answer to go on.

    `stays`: after a step that is not finite no other one is taken either, so that the weights are those before it
    when the host hears of it.
    """

    def __init__(self, device: torch.device, stays: bool):
        self.stays = stays
        self.refused = torch.zeros((), device=device)
        """1 where the device must not take the step."""
        self.launched: list[Launched] = []
        self._found: list[tuple[Tensor, torch.cuda.Event | None]] = []

    @property
    def is_full(self) -> bool:
        """Whether it is time to read, however seldom a run logs."""
        return len(self.launched) >= _MOST_UNREAD

    def see(self, step: Launched, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Decide on the device whether the step is refused: a scalar tensor, 1 or 0."""
        broken = ((loss + grad_norm) * 0 != 0).to(self.refused.dtype)
        self.refused = torch.maximum(self.refused, broken) if self.stays else broken
        found, event = torch.stack([loss, grad_norm]), None
        if found.is_cuda:
            found = torch.empty(2, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.launched.append(step)
        self._found.append((found, event))
        return self.refused

    def read(self, end: int) -> list[Launched]:
        """The steps before number `end` that were not read yet. Waits for the last of them, not for later ones."""
        n = sum(step.number < end for step in self.launched)
        steps, found = self.launched[:n], self._found[:n]
        del self.launched[:n], self._found[:n]
        if not steps:
            return []
        if found[-1][1] is not None:
            found[-1][1].synchronize()
        for step, (loss, norm) in zip(steps, torch.stack([tensor for tensor, _ in found]).tolist(), strict=True):
            step.loss, step.grad_norm = loss, norm
        return steps
