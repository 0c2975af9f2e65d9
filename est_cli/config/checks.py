"""Values that are allowed on their own, but clash with each other or cannot work here."""

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from est_cli.config.sections import (
    LOGGERS,
    DataConfig,
    LoggerConfig,
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


def clashes(sections: Mapping[str, Any], max_steps: int | None) -> list[str]:
    """One line for each clash. A check runs only if every section that it takes could be read."""
    known: dict[str, Any] = {**sections, "max_steps": max_steps}
    problems: list[str] = []
    if known.get("scheduler") is not None and max_steps is not None:
        try:
            known["stages"] = build_stages(known["scheduler"].stages, max_steps, known["scheduler"].names)
        except ValueError as error:
            problems.append(str(error))
            known["stages"] = ()
    checks = (_model, _lengths, _vocabulary, _blocks, _data, _tokenizer, _strategies, _logger, _processes, _profile)
    for check in (*checks, _growth, _decay):
        needed = [known.get(name) for name in inspect.signature(check).parameters]
        if None not in needed:
            problems += check(*needed)
    for key in ("name", "run_id"):
        if known.get(key) is not None and not _NAME.fullmatch(known[key]):
            problems.append(f"{key}={known[key]}: must be letters, digits, '.', '_' and '-', not starting with '.'")
    return problems


def _model(model: ModelConfig) -> Iterator[str]:
    width = model.head_dim or model.d_model // model.n_heads
    if model.head_dim is None and model.d_model % model.n_heads:
        yield f"model.n_heads={model.n_heads}: must divide model.d_model={model.d_model}"
    elif model.position == "rope" and width % 2:
        yield f"model.n_heads={model.n_heads}: rotary positions need heads of an even width, and these are {width} wide"
    if model.n_heads % model.n_kv_heads:
        yield f"model.n_kv_heads={model.n_kv_heads}: must divide model.n_heads={model.n_heads}"
    elif model.position == "learned" and model.n_kv_heads != model.n_heads:
        yield (
            f"model.n_kv_heads={model.n_kv_heads}: GPT-2 style (model.position=learned) has no grouped-query "
            f"attention; must equal model.n_heads={model.n_heads}"
        )


def _lengths(model: ModelConfig, data: DataConfig) -> Iterator[str]:
    if data.seq_len != "auto" and data.seq_len > model.max_seq_len:
        yield f"data.seq_len={data.seq_len}: must be at most model.max_seq_len={model.max_seq_len}"


def _vocabulary(model: ModelConfig, tokenizer: TokenizerConfig) -> Iterator[str]:
    if tokenizer.vocab_size != "auto" and tokenizer.vocab_size > model.vocab_size:
        yield f"tokenizer.vocab_size={tokenizer.vocab_size}: must be at most model.vocab_size={model.vocab_size}"


def _blocks(model: ModelConfig, sampling: SamplingConfig) -> Iterator[str]:
    if model.d_ff % sampling.mlp_block:
        yield f"sampling.mlp_block={sampling.mlp_block}: must divide model.d_ff={model.d_ff}"


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


def _strategies(sampling: SamplingConfig) -> Iterator[str]:
    yield from _name("sampling.strategy", sampling.strategy, STRATEGIES)
    if sampling.layer_strategy is not None:
        yield from _name("sampling.layer_strategy", sampling.layer_strategy, STRATEGIES)
    if sampling.rescale_layers and sampling.rescale.layers == "sqrt":
        yield "sampling.rescale.layers=sqrt: sampling.rescale_layers=true asks for inverse; leave one of them out"


def _logger(logger: LoggerConfig) -> Iterator[str]:
    yield from _name("logger.kind", logger.kind, dict.fromkeys(LOGGERS, print), "class")


def _name(key: str, name: str, known: Mapping[str, Callable], what: str = "function") -> Iterator[str]:
    """What is wrong with the name of a function or class, ours or a person's own."""
    try:
        named_function(name, known, key, what)
    except UserError as error:
        yield from error.problems


def _processes(trainer: TrainerConfig) -> Iterator[str]:
    if trainer.strategy == "single" and trainer.devices not in ("auto", 1):
        yield f"trainer.devices={trainer.devices}: needs trainer=ddp, fsdp or hsdp (trainer.strategy=ddp)"
    if trainer.strategy == "single" and trainer.shard:
        yield "trainer.shard=true: needs trainer=fsdp in its place: one process has nobody to share with"
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
    unknown = list(_name("scheduler.grow", scheduler.grow, GROWTHS))
    yield from unknown
    if unknown or model.n_heads % model.n_kv_heads or model.d_ff % sampling.mlp_block:
        return  # the other two are told by _model and _blocks
    sizes = []
    for index, spec in enumerate(scheduler.stages):
        try:
            sizes.append(spec.grown.sizes(model, sampling.mlp_block))
        except ValueError as error:
            key, _, problem = str(error).partition("=")
            options = ("depths",) if key == "n_layers" else ()
            yield f"{scheduler.typed(index, getattr(spec, key), key, *options)}={problem}"
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
