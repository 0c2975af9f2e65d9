"""Cross-checks: values that are allowed on their own, but clash with each other or cannot work here."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from est_cli.config.sections import (
    LOGGERS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainerConfig,
)
from est_cli.errors import UserError
from est_cli.plugins import named_function
from est_cli.subnet.schedule import GROWTHS, Stage, boundary_step, build_stages, layer_sources
from est_cli.subnet.strategies import STRATEGIES

AUTO_MAX_STEPS = 1000
"""Optimizer steps of a run that does not say how many."""

MOST_PROFILED = 100
"""Steps of a trace. Each is some thousand operations long, and viewers fail on longer traces."""

_PROFILE = re.compile(r"[0-9]{1,9}:[0-9]{1,9}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LIMITS = (
    ("data.seq_len", "must be at most", "model.max_seq_len"),
    ("tokenizer.vocab_size", "must be at most", "model.vocab_size"),
    ("model.n_kv_heads", "must divide", "model.n_heads"),
    ("sampling.mlp_block", "must divide", "model.d_ff"),
)
_NAMED = {
    "sampling.strategy": (STRATEGIES, "function"),
    "sampling.layer_strategy": (STRATEGIES, "function"),
    "scheduler.grow": (GROWTHS, "function"),
    "logger.kind": (dict.fromkeys(LOGGERS, print), "class"),
}
"""What may be ours or a person's own, named by a dotted path."""


def clashes(sections: Mapping[str, Any], max_steps: int | None) -> list[str]:
    """One line for each clash. Where a section could not be read, the checks that need it are left out."""
    known = {**sections, "max_steps": max_steps}
    problems = [*_limits(sections), *_names(sections)]
    if known.get("scheduler") is not None and max_steps is not None:
        try:
            known["stages"] = build_stages(known["scheduler"].stages, max_steps, known["scheduler"].boundary_keys)
        except ValueError as error:
            problems.append(str(error))
            known["stages"] = ()
    for check, *needed in (
        (_model, "model"),
        (_data, "data"),
        (_tokenizer, "tokenizer"),
        (_sampling, "sampling"),
        (_processes, "trainer"),
        (_profile, "trainer", "stages"),
        (_growth, "model", "sampling", "scheduler"),
        (_decay, "optimizer", "max_steps"),
    ):
        found = [known.get(name) for name in needed]
        if None not in found:
            problems += check(*found)
    return list(dict.fromkeys(problems))


def _value(sections: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None if its section could not be read."""
    section, _, name = key.partition(".")
    return getattr(sections.get(section), name, None)


def _limits(sections: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that another size limits."""
    for key, rule, limit in _LIMITS:
        size, total = _value(sections, key), _value(sections, limit)
        if isinstance(size, int) and total is not None and (total % size if rule == "must divide" else size > total):
            yield f"{key}={size}: {rule} {limit}={total}"


def _names(sections: Mapping[str, Any]) -> Iterator[str]:
    for key in ("name", "run_id"):
        if sections.get(key) is not None and not _NAME.fullmatch(sections[key]):
            yield f"{key}={sections[key]}: must be letters, digits, '.', '_' and '-', not starting with '.'"
    for key, (known, what) in _NAMED.items():
        if (name := _value(sections, key)) is not None:
            try:
                named_function(name, known, key, what)
            except UserError as error:
                yield from error.problems


def _model(model: ModelConfig) -> Iterator[str]:
    width = model.head_dim or model.d_model // model.n_heads
    if model.head_dim is None and model.d_model % model.n_heads:
        yield f"model.n_heads={model.n_heads}: must divide model.d_model={model.d_model}"
    elif model.position == "rope" and width % 2:
        yield f"model.n_heads={model.n_heads}: rotary positions need heads of an even width, and these are {width} wide"
    if model.position == "learned" and model.n_kv_heads != model.n_heads and model.n_heads % model.n_kv_heads == 0:
        yield (
            f"model.n_kv_heads={model.n_kv_heads}: GPT-2 style (model.position=learned) has no grouped-query "
            f"attention; must equal model.n_heads={model.n_heads}"
        )


def _data(data: DataConfig) -> Iterator[str]:
    if data.kind in ("text", "hf") and data.path is None and not data.sources:
        what = "a dataset's name, or a file or glob" if data.kind == "hf" else "a file, folder or glob"
        yield f"data.path: is missing; must be {what}"
    if data.kind == "hf" and data.path is not None and data.sources:
        yield f"data.path={data.path}: must be null beside data.sources, which are read in its place"
    if data.kind != "hf":
        yield from _unread(data)
    if data.streaming and data.train_tokens is not None:
        yield f"data.train_tokens={data.train_tokens}: must be null with data.streaming=true; a stream is read once"


def _unread(data: DataConfig) -> Iterator[str]:
    """Keys of data=hf, which no other kind reads."""
    defaults = {field.name: field.default for field in dataclasses.fields(data)}
    for key in ("sources", "name", "split", "val_split", "revision", "column", "streaming", "path"):
        value, kinds = getattr(data, key), "data=hf or data=text" if key == "path" else "data=hf"
        if value != defaults[key] and (key != "path" or data.kind != "text"):
            shown = str(value).lower() if value is True else value
            yield f"data.{key}={shown}: data.kind={data.kind} does not read it; leave it out, or give {kinds}"


def _tokenizer(tokenizer: TokenizerConfig) -> Iterator[str]:
    if tokenizer.kind == "byte" and tokenizer.path is not None:
        yield f"tokenizer.path={tokenizer.path}: tokenizer=byte reads no file; must be null, or with tokenizer=hf"
    if tokenizer.kind == "hf" and tokenizer.path is None:
        yield "tokenizer.path: is missing; must be a tokenizer.json or its folder"


def _sampling(sampling: SamplingConfig) -> Iterator[str]:
    if sampling.rescale_layers and sampling.rescale.layers == "sqrt":
        yield "sampling.rescale.layers=sqrt: sampling.rescale_layers=true asks for inverse; leave one of them out"


def _processes(trainer: TrainerConfig) -> Iterator[str]:
    if trainer.strategy == "single" and trainer.devices not in ("auto", 1):
        yield f"trainer.devices={trainer.devices}: needs trainer=ddp, fsdp or hsdp (trainer.strategy=ddp)"
    # A run directory's config has the size that followed from the strategy.
    follows = trainer.devices if trainer.strategy == "fsdp" else 1
    if trainer.strategy != "hsdp" and trainer.shard_size not in ("auto", follows):
        yield f"trainer.shard_size={trainer.shard_size}: needs trainer=hsdp (trainer.strategy=hsdp)"


def _profile(trainer: TrainerConfig, stages: Sequence[Stage]) -> Iterator[str]:
    value = trainer.profile
    if value is None:
        return
    if not (isinstance(value, str) and _PROFILE.fullmatch(value)):
        yield (
            f"trainer.profile={value}: must be STEP:COUNT, such as 10:3 (in YAML with quotes, '10:3'): "
            f"COUNT steps of every stage, at least 1 and at most {MOST_PROFILED}, from its step STEP on, at least 0"
        )
        return
    first, count = trainer.profiled
    if not 1 <= count <= MOST_PROFILED:
        yield f"trainer.profile={value}: COUNT must be at least 1 and at most {MOST_PROFILED}"
    elif stages and first + count > (shortest := min(stages, key=lambda stage: stage.steps)).steps:
        yield (
            f"trainer.profile={value}: STEP + COUNT must be at most {shortest.steps}, the steps of stage "
            f"{shortest.number}; STEP counts from the start of each stage"
        )


def _growth(model: ModelConfig, sampling: SamplingConfig, scheduler: SchedulerConfig) -> Iterator[str]:
    """Every stage's part of the model must exist, and a model only grows."""
    if model.n_heads % model.n_kv_heads or model.d_ff % sampling.mlp_block:
        return  # _limits reports it
    sizes = []
    for index, spec in enumerate(scheduler.stages):
        try:
            sizes.append(spec.grown.sizes(model, sampling.mlp_block))
        except ValueError as error:
            key, _, problem = str(error).partition("=")
            options = ("depths",) if key == "n_layers" else ()
            yield f"{scheduler.key_of(index, getattr(spec, key), key, *options)}={problem}"
            return
    for index, (before, after) in enumerate(itertools.pairwise(sizes), 1):
        for key in ("n_layers", "n_heads", "d_ff"):
            if after[key] < before[key]:
                yield f"scheduler.stages[{index}].{key}={after[key]}: follows {before[key]}; a model only grows"
        if before["n_layers"] < after["n_layers"]:
            try:
                layer_sources(scheduler.grow, before["n_layers"], after["n_layers"])
            except UserError as error:
                yield from error.problems


def _decay(optimizer: OptimizerConfig, max_steps: int) -> Iterator[str]:
    warmup, start = boundary_step(optimizer.warmup, max_steps), optimizer.decay_start(max_steps)
    if optimizer.decay != "wsd" or warmup <= start:
        return
    key = "decay_fraction" if optimizer.decay_steps is None else "decay_steps"
    yield (
        f"optimizer.{key}={getattr(optimizer, key)}: with optimizer.decay=wsd the decay takes the last "
        f"{max_steps - start} of the {max_steps} steps (trainer.max_steps), and warmup the first {warmup} "
        f"(optimizer.warmup={optimizer.warmup}); together they must be at most {max_steps}"
    )
