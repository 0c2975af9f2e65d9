"""A run directory opened for reading: its config, its data, the model of its newest checkpoint, and its subnetworks."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from est_cli.config import CONFIG_FILE, DataConfig, TrainConfig, read_config_file, read_train_config
from est_cli.data.run_data import RunData, Text
from est_cli.data.tokenizers import Tokenizer
from est_cli.data.tokens import TokenStore, open_store, stored
from est_cli.errors import UserError, nearest
from est_cli.model.transformer import Transformer, layer_of
from est_cli.subnet.plan import Plan, Subnetwork, growth_into, model_after, stage_subnetwork, whole_plan
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage, stage_at
from est_cli.training.checkpoint import Checkpoint, Checkpoints
from est_cli.training.subnetwork import PackedSubnetwork


@dataclass(frozen=True)
class OpenRun:
    folder: Path
    config: TrainConfig
    checkpoint: Checkpoint
    model: Transformer
    """On its device: the full model, or the part of it that had joined at the checkpoint."""

    @cached_property
    def data(self) -> RunData:
        return RunData(self.folder, self.config.tokenizer.kind)


def read_run_config(folder: Path) -> TrainConfig:
    """The config of a run directory. Raises UserError if `folder` is not one."""
    if not (folder / CONFIG_FILE).exists():
        parent = folder.parent
        siblings = [str(p.parent) for p in parent.glob(f"*/{CONFIG_FILE}")] if parent.is_dir() else []
        raise UserError(f"run={folder}: must be a run directory (with {CONFIG_FILE}){nearest(str(folder), siblings)}")
    return read_train_config(read_config_file(folder, f"run={folder}"))


def open_run(folder: Path, warn: Callable[[str], None]) -> OpenRun:
    """Loads the newest sound checkpoint. Raises UserError if there is none."""
    config = read_run_config(folder)
    checkpoint = Checkpoints(folder / "checkpoints").newest(warn)
    if checkpoint is None:
        raise UserError(
            f"run={folder}: this run has no checkpoint; trainer.save_final=weights or full writes one "
            f"(this run had {config.trainer.save_final})"
        )
    return OpenRun(folder, config, checkpoint, load_model(config, checkpoint))


def load_model(config: TrainConfig, checkpoint: Checkpoint) -> Transformer:
    """The model of a checkpoint on its device; if the run grows, the part that had joined by then."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.device == "cuda" else "cpu")
    model = Transformer(config.model)
    checkpoint.load_model(model)
    grown = model_after(config, checkpoint.step)
    return packed(model.to(device), Sampled(Subnetwork(grown), whole_plan(grown)))


def run_tokenizer(run: OpenRun, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that the run was trained with: its own copy, else that of its token files."""
    return run.data.tokenizer or run_store(run, say).tokenizer


def run_store(run: OpenRun, say: Callable[[str], None], other: DataConfig | None = None) -> TokenStore:
    """Token files made with the run's own tokenizer: of `other` data, or those that the run trained on.

    If the latter are gone, they are made from the text that the run's config names now; a changed text is told.
    """
    config = run.config
    if other is None and (store := stored(config.data, run.data)):
        return store

    def check(text: Text) -> None:
        if other is None:
            run.data.tell(text, say)

    vocab_size, show_progress = config.model.vocab_size, sys.stderr.isatty()
    return open_store(other or config.data, config.tokenizer, vocab_size, say, show_progress, run.data, check)


@dataclass(frozen=True)
class Sampled:
    """The shape and the plan of one subnetwork."""

    shape: Subnetwork
    plan: Plan


def sampled_at(config: TrainConfig, step: int, steps_done: int | None = None) -> Sampled:
    """The subnetwork that the run trained in optimizer step `step`.

    Raises UserError if the run has no such step, or if the weights after `steps_done` steps do not hold the
    subnetwork, because the model grew in between.
    """
    if not 0 <= step < config.trainer.max_steps:
        raise UserError(f"plan_step={step}: must be an integer in [0, {config.trainer.max_steps - 1}]")
    stage = stage_at(config.stages, step)
    if steps_done is not None and stage.first_step >= steps_done and (growth := growth_into(config, stage)):
        raise UserError(
            f"plan_step={step}: the newest checkpoint, of {steps_done} steps, is from before step {stage.first_step}, "
            f"where the model {growth}; name an earlier step"
        )
    return _sample(config, step, stage)


def sampled_with(config: TrainConfig, rates: Rates) -> Sampled:
    """A subnetwork with the given rates, drawn with the run's seed, granularity and strategy."""
    return _sample(config, 0, Stage(1, 0, 1, rates))


def _sample(config: TrainConfig, step: int, stage: Stage) -> Sampled:
    plan = sample(config.seed, step, stage, config.model, config.sampling)
    return Sampled(stage_subnetwork(config.model, config.sampling, stage), plan)


def packed(model: Transformer, subnet: Sampled) -> Transformer:
    """The subnetwork as training runs it: its rescales are settings of its blocks."""
    pack = PackedSubnetwork(model, subnet.shape, next(model.parameters()).dtype)
    pack.load(subnet.plan)
    return pack.module


@torch.no_grad()
def standalone(module: Transformer, subnet: Sampled) -> Transformer:
    """An ordinary model, without rescales, whose logits equal those of the packed `module`.

    A branch's scale multiplies its output projection; the layer's part of the scale also multiplies the bias.
    """
    shape, scales = subnet.shape, subnet.plan.scales
    dtype = next(module.parameters()).dtype
    model = Transformer(shape.model, dtype=dtype)
    branches = {"attention.out": (0, shape.head_scale), "mlp.down": (1, shape.mlp_scale)}
    sources = dict(module.named_parameters())
    for name, parameter in model.named_parameters():
        branch, _, leaf = name.split(".", 2)[-1].rpartition(".")
        factor = 1.0
        if branch in branches:
            column, unit = branches[branch]
            factor = float(scales[layer_of(name), column]) / (1.0 if leaf == "weight" else unit)
        parameter.copy_(sources[name] * factor)
    return model
