"""The training loop: rates → plan → packed subnetwork → gradients → optimizer on the sampled rows → log."""

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from est_cli.config import TrainConfig, as_plain
from est_cli.data.batches import Tokens, validation_windows
from est_cli.errors import RunFailed
from est_cli.kernels.dispatch import kernels_for
from est_cli.model.transformer import Transformer, initialise
from est_cli.subnet.plan import Subnetwork, growth_into, model_after, stage_subnetwork
from est_cli.subnet.schedule import Stage, stage_at
from est_cli.training.checkpoint import Checkpoint, Checkpoints, Saving
from est_cli.training.device import Compiler, peak_memory_bytes, reset_peak_memory
from est_cli.training.distributed import World, peer_errors
from est_cli.training.inputs import Inputs
from est_cli.training.optimizer import SampledAdamW, learning_rate
from est_cli.training.pretrained import load_pretrained
from est_cli.training.profile import Profile, phase
from est_cli.training.steps import Launched, Observer, Steps, is_due
from est_cli.training.subnetwork import DTYPES, MaskedSubnetwork, PackedSubnetwork, Update, pack_on
from est_cli.training.validation import validation_loss

_backward = phase("backward")(Tensor.backward)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Literal["done", "stopped"]
    steps: int
    train_s: float
    peak_memory_bytes: int
    skipped_steps: int


class Training:
    """A run's state, with one method per phase of a step."""

    def __init__(self, config: TrainConfig, tokens: Tokens, world: World, observers: Sequence[Observer]):
        self.config, self.tokens, self.world, self.stages = config, tokens, world, config.stages
        self.dtype = DTYPES[config.trainer.precision]
        recompute, kernels = config.trainer.recompute == "block", kernels_for(config.kernels, world.device)
        model = Transformer(config.model, "meta", recompute=recompute, kernels=kernels)
        self.model = initialise(model, config.seed, world.device, world.own)
        """The masters; on several ranks, this rank's columns of each matrix."""
        if config.model.init_from is not None:
            load_pretrained(self.model, world.own)
        self.pack = pack_on(world)
        self.optimizer = SampledAdamW(self.model, config.optimizer, model_after(config, 0))
        self.compiler = Compiler(config.trainer.compile)
        self.inputs = Inputs(config, tokens, world)
        self.steps = Steps(config, world, self.optimizer, observers if world.is_main else ())
        self.progress = self.steps.progress
        self.stopping: Callable[[], bool] = lambda: False
        self.asked: Tensor | None = None
        """How many ranks were asked to stop, from the step's all-reduce."""
        self.saving: Saving | None = None

    @property
    def step(self) -> int:
        """The optimizer step that comes next."""
        return self.progress.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue after the last step of `checkpoint`."""
        checkpoint.load_weights(self.weights())
        self.optimizer.join(model_after(self.config, checkpoint.step))
        if checkpoint.can_resume:
            checkpoint.load_moments(self.moments())
        self.steps.restore(checkpoint.state)

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name, whole or as a DTensor of this rank's columns; to save, and to fill in place."""
        return self.world.full({name: parameter.data for name, parameter in self.model.named_parameters()})

    def moments(self) -> dict[str, Tensor]:
        """As `weights`: every tensor that the optimizer carries between steps."""
        return self.world.full(self.optimizer.state())

    @peer_errors()
    def run(self, checkpoints: Checkpoints, stopping: Callable[[], bool], profile: Profile | None = None) -> Outcome:
        """Train to the end, or until `stopping` returns True; a stopped run always has a checkpoint of its last step.

        Raises PeerLost if another rank has ended, or does not answer in time.
        """
        self.stopping, stopped = stopping, False
        max_steps, save_final = self.config.trainer.max_steps, self.config.trainer.save_final
        reset_peak_memory(self.world.device)
        # A run that resumes already has a checkpoint of its first step.
        with Saving(checkpoints, self.world, self.steps.say, self.step or None) as self.saving:
            while self.step < max_steps and not stopped:
                stopped = self._train_stage(stage_at(self.stages, self.step), profile)
                if self.world.mesh is not None:
                    gc.collect()  # FSDP's modules hold each other, and their slots
            if stopped or save_final != "none":
                self._save("full" if stopped else save_final, is_last=True)
        status, memory = "stopped" if stopped else "done", peak_memory_bytes(self.world.device)
        return Outcome(status, self.step, self.progress.train_s, memory, self.progress.skipped_steps)

    def _train_stage(self, stage: Stage, profile: Profile | None) -> bool:
        """Train to the end of the stage, or until the run is asked to stop; returns whether it was."""
        trainer, lasting = self.config.trainer, self.saving.checkpoints.lasting
        if self.step == stage.first_step:
            self._grow_into(stage)
        subnet = self._build(stage)
        with profile.stage(stage, self.step) if profile else contextlib.nullcontext(lambda: None) as advance:
            while self.step < stage.end:
                self._train_step(stage, subnet)
                self.saving.poll()
                advance()
                if self.step == trainer.max_steps:
                    return False
                if self._is_asked_to_stop():
                    return True
                if is_due(self.step, trainer.checkpoint_every) or self.step in lasting:
                    self._save("full", is_last=False)
                if (error := self.inputs.error(self.step)) is not None:
                    self._save("full", is_last=True)
                    raise error
        return False

    def _grow_into(self, stage: Stage) -> None:
        """Let layers, heads and neurons join. A checkpoint at the boundary is from before: a restart does it again."""
        growth = growth_into(self.config, stage)
        if growth is not None:
            self.steps.settle()
            self.optimizer.grow(growth, self.config.scheduler.grow_moments)
            self.steps.say(f"step {self.step}: the model {growth}")

    def _build(self, stage: Stage) -> PackedSubnetwork | MaskedSubnetwork:
        shape = stage_subnetwork(self.config.model, self.config.sampling, stage)
        kind = partial(MaskedSubnetwork, pack=self.pack) if self.config.kernels == "masked" else self.pack
        subnet = kind(self.model, shape, self.dtype)
        self.compiler.compile(subnet.module)
        return subnet

    def _train_step(self, stage: Stage, subnet: PackedSubnetwork | MaskedSubnetwork) -> None:
        with self.progress.timed():
            self._launch(stage, subnet)
            self.steps.read()
        if compiled := self.compiler.news():
            self.steps.say(f"step {self.step - 1}: {compiled}")
        if self.steps.evaluates(self.step):
            self.progress.val_loss, self.progress.val_step = self.validate(subnet), self.step
            if self.config.trainer.on_nonfinite == "stop" and not math.isfinite(self.progress.val_loss):
                raise RunFailed(f"the validation loss after step {self.step - 1} is {self.progress.val_loss}")
        self.steps.log()

    def _launch(self, stage: Stage, subnet: PackedSubnetwork | MaskedSubnetwork) -> None:
        """One optimizer step. Nothing here waits for the device."""
        plan, windows = self.inputs.of(self.step)
        subnet.load(plan)
        loss = self._gradients(subnet, windows)
        updates = subnet.updates()
        grad_norm = self._combine(loss, updates)
        lr = learning_rate(self.config.optimizer, self.step, self.config.trainer.max_steps)
        refused = self.steps.watch.add(Launched(self.step, stage, plan, lr), loss, grad_norm)
        self.optimizer.step(updates, lr, grad_norm, refused)
        self.progress.step += 1

    def _gradients(self, subnet: PackedSubnetwork | MaskedSubnetwork, windows: Iterable[Tensor]) -> Tensor:
        """Forward and backward of every micro-batch [B, T + 1]; returns their mean loss."""
        n, loss = self.config.trainer.grad_accum, torch.zeros((), device=self.world.device)
        for number, tokens in enumerate(windows, 1):
            batch = tokens.to(self.world.device, non_blocking=True)
            subnet.reduce_next(number == n)
            micro_loss = subnet.loss(batch[:, :-1], batch[:, 1:]) / n
            _backward(micro_loss)
            loss += micro_loss.detach()
        return loss

    @phase("norm")
    @torch.no_grad()
    def _combine(self, loss: Tensor, updates: Sequence[Update]) -> Tensor:
        """Average what the backward pass did not over the ranks; returns the norm of all gradients."""
        sharded = [update.gradient for update in updates if update.is_sharded]
        whole = [update.gradient for update in updates if not update.is_sharded]
        norm, self.asked = self.world.combine(loss, sharded, whole, self.world.size > 1 and self.stopping())
        return norm

    def _is_asked_to_stop(self) -> bool:
        """Ranks stop together, after the step whose all-reduce says that any of them was asked to."""
        return self.stopping() if self.world.size == 1 else bool(self.asked.item())

    def validate(self, subnet: PackedSubnetwork | MaskedSubnetwork) -> float:
        """Loss of the layers that have joined, without a rescale, on the first eval_tokens of the validation split.

        `subnet` is the stage's; its slots are used again if it holds all these layers.
        """
        trainer, joined = self.config.trainer, model_after(self.config, self.step)
        windows = validation_windows(self.tokens.val, self.config.data.seq_len, trainer.eval_tokens)
        if not (isinstance(subnet, PackedSubnetwork) and subnet.small == joined):
            subnet = self.pack(self.model, Subnetwork(joined), self.dtype)
        with self.compiler.eager():
            return validation_loss(subnet, windows, trainer.batch_size, self.world)

    def _save(self, contents: Literal["full", "weights"], is_last: bool) -> None:
        """Write a checkpoint of the full state, or only of the weights; see Saving.save."""
        self.steps.settle()
        facts = {"config": as_plain(self.config), **asdict(self.progress)}
        moments = self.moments() if contents == "full" else None
        self.saving.save(self.step, self.weights(), moments, facts, is_last)
