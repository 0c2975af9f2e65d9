"""The training loop: rates → plan → packed subnetwork → gradients → optimizer on the sampled rows → log."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from est_cli.config import TrainConfig, as_plain
from est_cli.data.batches import Tokens, validation_windows
from est_cli.errors import RunFailed, UserError
from est_cli.kernels.dispatch import kernels_for
from est_cli.model.transformer import Transformer, initialise
from est_cli.subnet.plan import Subnetwork, growth_into, model_after, stage_subnetwork
from est_cli.subnet.schedule import Stage, stage_at
from est_cli.training.ahead import Inputs
from est_cli.training.checkpoint import Checkpoint, Checkpoints
from est_cli.training.compiled import Compiler
from est_cli.training.device import peak_memory_bytes, reset_peak_memory
from est_cli.training.distributed import World, peer_errors
from est_cli.training.growth import grow
from est_cli.training.nonfinite import NonFinite
from est_cli.training.optimizer import SampledAdamW, learning_rate
from est_cli.training.pretrained import load_pretrained
from est_cli.training.profile import NoProfile, Profile, phase
from est_cli.training.record import Observer, Records
from est_cli.training.saving import Saving, State
from est_cli.training.subnetwork import DTYPES, MaskedSubnetwork, Pack, PackedSubnetwork, Update
from est_cli.training.validation import validation_loss
from est_cli.training.watch import Launched, Watch


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Literal["done", "stopped"]
    steps: int
    train_s: float
    peak_memory_bytes: int
    skipped_steps: int
    """Steps that were not taken, because their loss or gradient was not finite."""


class Training:
    """A run's state, master weights and moments on the device, and one method a phase."""

    def __init__(self, config: TrainConfig, tokens: Tokens, world: World, observers: Sequence[Observer]):
        self.config, self.tokens, self.world, self.observers = config, tokens, world, observers
        self.stages = config.stages
        self.records = Records(config, world.device, world.size)
        self.dtype = DTYPES[config.trainer.precision]
        recompute, kernels = config.trainer.recompute == "block", kernels_for(config.kernels, world.device)
        model = Transformer(config.model, "meta", recompute=recompute, kernels=kernels)
        self.model = initialise(model, config.seed, world.device, world.own)
        """The masters: on several ranks this one's columns of every matrix."""
        if config.model.init_from is not None:
            load_pretrained(self.model, world.own)
        self.pack = pack_on(world)
        self.grown = model_after(config, 0)
        self.optimizer = SampledAdamW(self.model, config.optimizer, self.grown)
        self.compiler = Compiler(config.trainer.compile)
        self.watch = Watch(world.device, stays=config.trainer.on_nonfinite == "stop")
        self.behind = int(world.device.type == "cuda")
        """Steps that the device has to go on with while the host reads and logs the one before; 0 on a CPU."""
        self.inputs = Inputs(config, tokens, world, end=config.trainer.max_steps if self.behind else 0)
        self.stopping: Callable[[], bool] = lambda: False
        self.asked: Tensor | None = None
        """How many ranks were asked to stop, as the step's all-reduce has found."""
        self.step = 0
        self.train_s = 0.0
        self.val_loss: float | None = None
        self.val_step: int | None = None
        self.skipped_steps = 0
        self.saved_step: int | None = None
        self.saving: Saving | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on after the last step of `checkpoint`."""
        checkpoint.load_weights(self.weights())
        self.grown = model_after(self.config, checkpoint.step)
        self.optimizer.join(self.grown)
        if checkpoint.can_resume:
            checkpoint.load_moments(self.moments())
        self.step = self.saved_step = checkpoint.step
        for name in _CARRIED:
            setattr(self, name, checkpoint.state.get(name, getattr(self, name)))
        self.records.asked = (self.step, self.train_s)

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name, whole or as a DTensor of this rank's columns; to save, and to fill in place."""
        return self.world.full({name: parameter.data for name, parameter in self.model.named_parameters()})

    def moments(self) -> dict[str, Tensor]:
        """As `weights`: every tensor that the optimizer carries between steps."""
        return self.world.full(self.optimizer.state())

    @peer_errors()
    def run(self, checkpoints: Checkpoints, stopping: Callable[[], bool], profile: Profile | None = None) -> Outcome:
        """Train to the end, or until `stopping` asks; either way the last step has a checkpoint.

        Raises PeerLost where another rank has ended, or does not answer in time.
        """
        trainer, profile = self.config.trainer, profile or NoProfile()
        self.stopping = stopping
        reset_peak_memory(self.world.device)
        stopped, self.saving = False, Saving(checkpoints, self.world, self._say, self.saved_step)
        with self.saving:
            while self.step < trainer.max_steps and not stopped:
                stage = stage_at(self.stages, self.step)
                if self.step == stage.first_step:
                    self._grow_into(stage)
                subnet = self._build(stage)
                with profile.stage(stage, self.step) as advance:
                    while self.step < stage.end and not stopped:
                        self._train_step(stage, subnet)
                        self.saving.hear()
                        advance()
                        stopped = self._is_asked_to_stop() and self.step < trainer.max_steps
                        due = _due(self.step, trainer.checkpoint_every) or self.step in checkpoints.lasting
                        if due and not stopped and self.step < trainer.max_steps:
                            self._save("full", is_last=False)
                        if not stopped and self.step < trainer.max_steps:
                            self._await_text()
                del subnet
                if self.world.mesh is not None:
                    gc.collect()  # FSDP's modules hold each other, and their slots
            self._save("full" if stopped else trainer.save_final, is_last=True)
        status, memory = "stopped" if stopped else "done", peak_memory_bytes(self.world.device)
        return Outcome(status, self.step, self.train_s, memory, self.skipped_steps)

    def _grow_into(self, stage: Stage) -> None:
        """A checkpoint at a boundary holds the model before the growth, and this is done again after a restart."""
        growth = growth_into(self.config, stage)
        if growth is not None:
            self._settle()
            grow(self.model, self.optimizer, growth, self.config.scheduler.grow_moments)
            self.grown = growth.after
            self._say(f"step {self.step}: the model {growth}")

    def _build(self, stage: Stage) -> PackedSubnetwork | MaskedSubnetwork:
        shape = stage_subnetwork(self.config.model, self.config.sampling, stage)
        masks = self.config.kernels == "masked"
        subnet = (partial(MaskedSubnetwork, pack=self.pack) if masks else self.pack)(self.model, shape, self.dtype)
        self.compiler.compile(subnet.module)
        return subnet

    def _train_step(self, stage: Stage, subnet: PackedSubnetwork | MaskedSubnetwork) -> None:
        config, started = self.config, time.perf_counter()
        plan, windows = self.inputs.of(self.step)
        subnet.load(plan)
        loss = torch.zeros((), device=self.world.device)
        for number, tokens in enumerate(windows, 1):
            batch = tokens.to(self.world.device, non_blocking=True)
            subnet.reduce_next(number == config.trainer.grad_accum)
            micro_loss = subnet.loss(batch[:, :-1], batch[:, 1:]) / config.trainer.grad_accum
            _backward(micro_loss)
            loss += micro_loss.detach()
        updates = subnet.updates()
        lr = learning_rate(config.optimizer, self.step, config.trainer.max_steps)
        grad_norm = self._combine(loss, updates)
        refused = self.watch.see(Launched(self.step, stage, plan, lr), loss, grad_norm)
        self.optimizer.step(updates, lr, grad_norm, refused)
        self.step += 1
        evaluates = self._evaluates(self.step)
        done = self._settled(self._readable(evaluates))
        self.train_s += time.perf_counter() - started
        if compiled := self.compiler.news():
            self._say(f"step {self.step - 1}: {compiled}")
        if evaluates:
            self.val_loss, self.val_step = self.validate(subnet), self.step
            if self.watch.stays and not math.isfinite(self.val_loss):
                raise RunFailed(f"the validation loss after step {self.step - 1} is {self.val_loss}")
        self._report(done)

    @phase("norm")
    @torch.no_grad()
    def _combine(self, loss: Tensor, updates: Sequence[Update]) -> Tensor:
        """Average over the ranks what the backward pass has not, and return the norm of all gradients."""
        sharded = [update.gradient for update in updates if update.is_sharded]
        whole = [update.gradient for update in updates if not update.is_sharded]
        norm, self.asked = self.world.combine(loss, sharded, whole, self.world.size > 1 and self.stopping())
        return norm

    def _is_asked_to_stop(self) -> bool:
        """Several ranks stop after the step in whose all-reduce any of them said that it was asked to."""
        return self.stopping() if self.world.size == 1 else bool(self.asked.item())

    def _evaluates(self, step: int) -> bool:
        """Whether the model is evaluated after so many steps."""
        return step == self.config.trainer.max_steps or _due(step, self.config.trainer.eval_every)

    def _logs(self, step: int) -> bool:
        return self._evaluates(step) or step == 1 or _due(step, self.config.trainer.log_every)

    def _readable(self, evaluates: bool) -> int:
        """What the steps before this one found is read now; 0 where none of them is to be logged."""
        if evaluates or self.config.trainer.on_nonfinite == "skip":
            return self.step
        end = self.step - self.behind
        return end if self._logs(end) or self.watch.is_full else 0

    def _settled(self, end: int) -> list[Launched]:
        """The steps before `end` that were not read yet: waits for the device where there is any."""
        steps = self.watch.read(end)
        for step in steps:
            if step.is_finite:
                self.optimizer.confirm()
                continue
            self.optimizer.forget()
            if self.watch.stays:
                self.step = step.number
                raise NonFinite(step)
            self.skipped_steps += 1
            if self.skipped_steps == 1:
                skipped = "skipped (trainer.on_nonfinite=skip); the summary counts all that will be"
                self._say(f"{NonFinite(step)}: {skipped}")
        return steps

    def _report(self, steps: Sequence[Launched]) -> None:
        step_s = self.records.step_s(steps[-1], self.train_s) if steps else 0.0
        for step in (step for step in steps if self.world.is_main and self._logs(step.number + 1)):
            val_loss = self.val_loss if self.val_step == step.number + 1 else None
            record = self.records.of(step, step_s, self.grown, val_loss)
            for observer in self.observers:
                observer.log(record)

    def _settle(self) -> None:
        """Read and report all that was launched."""
        started = time.perf_counter()
        done = self._settled(self.step)
        self.train_s += time.perf_counter() - started
        self._report(done)

    def _await_text(self) -> None:
        """A stream that cannot be read ends the run between two steps, with a checkpoint. All ranks agree on it."""
        if self.inputs.are_streamed:
            error = self.inputs.error(self.step)
            if self.world.any(error is not None):
                self._save("full", is_last=True)
                raise error or UserError()

    def validate(self, subnet: PackedSubnetwork | MaskedSubnetwork) -> float:
        """Loss of all that has joined the model on the first eval_tokens of the validation split.

        `subnet` is the stage's, whose slots serve again where it holds all of that.
        """
        trainer = self.config.trainer
        windows = validation_windows(self.tokens.val, self.config.data.seq_len, trainer.eval_tokens)
        if not (isinstance(subnet, PackedSubnetwork) and subnet.small == self.grown):
            subnet = self.pack(self.model, Subnetwork(self.grown), self.dtype)
        with self.compiler.eager():
            return validation_loss(subnet, windows, trainer.batch_size, self.world)

    def _say(self, message: str) -> None:
        if self.world.is_main:
            for observer in self.observers:
                observer.say(message)

    def _save(self, contents: str, is_last: bool) -> None:
        """Write a checkpoint of "full" state, of "weights", or of "none"; see Saving."""

        def state() -> State:
            self._settle()
            facts = {"config": as_plain(self.config), **{name: getattr(self, name) for name in _CARRIED}}
            return self.weights(), self.moments() if contents == "full" else None, facts

        if contents == "none":
            self.saving.hear(waits=True)
        else:
            self.saving.save(self.step, state, is_last)


def pack_on(world: World) -> Pack:
    """How a subnetwork is packed: into one small model, or into one that the ranks share."""
    if world.mesh is None:
        return PackedSubnetwork
    from est_cli.training.sharded import ShardedSubnetwork  # half a second, which one process never needs

    return partial(ShardedSubnetwork, world=world)


_CARRIED = ("train_s", "val_loss", "val_step", "skipped_steps")
"""What a run that goes on knows of its past, beside its weights and moments."""


@phase("backward")
def _backward(loss: Tensor) -> None:
    loss.backward()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
