"""The sections of a config: frozen dataclasses whose types say what is allowed.

What a key means stands beside it in conf/, where --help finds it. A docstring here adds what that line has no room for.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from est_cli.schema import Within
from est_cli.subnet.schedule import Rate, Stage, StageSpec, boundary_step, build_stages

Count = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
Positive = Annotated[float, Within(0, open_low=True)]
NotNegative = Annotated[float, Within(0)]
Fraction = Annotated[float, Within(0, 1)]
Share = Annotated[float, Within(0, 1, open_low=True)]
Momentum = Annotated[float, Within(0, 1, open_high=True)]
Auto = Literal["auto"]
Format = Literal["text", "json"]
"""What a command prints: words and tables, or one JSON object."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. GPT-2 and Llama are settings of it; a packed subnetwork is one with smaller counts."""

    n_layers: Count
    n_heads: Count
    n_kv_heads: Count
    d_model: Count
    d_ff: Count
    vocab_size: Count
    max_seq_len: Count
    norm: Literal["layernorm", "rmsnorm"]
    position: Literal["learned", "rope"]
    mlp: Literal["gelu", "swiglu"]
    bias: bool
    tie_embeddings: bool
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 10000.0
    init: Literal["gpt2", "tinyllama"] = "gpt2"
    head_dim: Count | None = None
    init_from: str | None = dataclasses.field(default=None, compare=False)
    """Not part of the shape: models that differ only here are equal."""

    @property
    def gated(self) -> bool:
        """SwiGLU: gate and up projections share their neurons."""
        return self.mlp == "swiglu"

    def with_head_dim(self) -> "ModelConfig":
        """The same with a number for head_dim."""
        return dataclasses.replace(self, head_dim=self.head_dim or self.d_model // self.n_heads)


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    path: str
    weight: Positive
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"


@dataclass(frozen=True)
class DataConfig:
    kind: Literal["stdlib", "packages", "text", "hf"]
    seq_len: Count | Auto = "auto"
    val_fraction: Annotated[float, Within(0, 0.5, open_low=True)] = 0.05
    """Counted in bytes of whole documents; unused if the source has a validation split of its own."""
    path: str | tuple[str, ...] | None = None
    cache_dir: str | None = None
    name: str | None = None
    split: str = "train"
    val_split: str | None = None
    revision: str | None = None
    column: str = "text"
    sources: tuple[SourceConfig, ...] = ()
    """The weights are shares of the tokens."""
    streaming: bool = False
    """Sequences keep the text's order, shuffled within blocks of 1024."""
    on_broken: Literal["stop", "skip"] = "stop"
    train_tokens: Count | None = None
    num_workers: Count | Auto = "auto"
    on_change: Literal["refuse", "accept"] = "refuse"


@dataclass(frozen=True)
class TokenizerConfig:
    kind: Literal["sentencepiece", "byte", "hf"]
    vocab_size: Count | Auto = "auto"
    path: str | None = None
    train_bytes: Count = 20_000_000


Rescale = Literal["none", "sqrt", "inverse"]
"""A unit that is kept with probability p is multiplied by 1, 1/√p or 1/p."""


@dataclass(frozen=True)
class RescaleConfig:
    """What kept units are multiplied by; the paper scales heads and neurons by total/kept."""

    heads: Rescale = "inverse"
    mlp: Rescale = "inverse"
    layers: Rescale = "none"
    """With layer_strategy=increasing each layer has its own p."""


@dataclass(frozen=True)
class SamplingConfig:
    """What is sampled, and how. The scheduler's stages refer to the three rates."""

    heads: Rate = 0.5
    mlp: Rate = 0.5
    layers: Rate = 0.5
    mlp_block: Count = 1
    gqa: Literal["group", "query"] = "group"
    strategy: str = "random"
    layer_strategy: str | None = None
    resample_every: Count = 1
    rescale_layers: bool = False
    rescale: RescaleConfig = RescaleConfig()

    @property
    def rescale_of_layers(self) -> Rescale:
        return "inverse" if self.rescale_layers else self.rescale.layers

    @property
    def strategy_of_layers(self) -> str:
        return self.layer_strategy or self.strategy


GROW_KEYS = ("grow", "grow_moments")
"""How layers join. The scheduler's other keys, apart from `stages`, are what the stages are made from."""


@dataclass(frozen=True)
class SchedulerConfig:
    stages: tuple[StageSpec, ...]
    grow: str = "stack"
    """A name in est_cli/subnet/schedule.py's GROWTHS, or the dotted path of your own function."""
    grow_moments: Literal["copy", "reset"] = "copy"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The scheduler's other keys, which the stages were made from: stage1_end, n_stages, ..."""

    @property
    def boundary_keys(self) -> tuple[str, ...]:
        """The config key that decides the end of each stage."""
        return tuple(
            self.key_of(i, stage.end, "end", f"stage{i + 1}_end", "grow_at") for i, stage in enumerate(self.stages)
        )

    def key_of(self, index: int, value: Any, key: str, *options: str) -> str:
        """The key that a person typed to give stage `index` a value: one of the options, or the stage's own key."""
        return option_that_gave(self.options, options, index, value) or f"scheduler.stages[{index}].{key}"


@dataclass(frozen=True)
class OptimizerConfig:
    GONE: ClassVar = {"kind": ("adamw", "leave it out, there is only AdamW")}
    """Former keys, each with the only value that is still read, and what to write instead of any other."""

    lr: Positive = 6e-4
    weight_decay: NotNegative = 0.1
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Positive = 1e-8
    grad_clip: Positive | None = 1.0
    warmup: Natural | Fraction = 0.02
    decay: Literal["cosine", "linear", "wsd", "none"] = "cosine"
    decay_steps: Count | Share | None = None
    decay_fraction: Share = 0.2
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    """sqrt: Hägele et al. (2024), arXiv 2405.18392."""
    min_lr_ratio: Fraction = 0.1
    unsampled: Literal["zero_grad", "freeze"] = "zero_grad"

    def decay_start(self, max_steps: int) -> int:
        """The first step of the decay, which still has the full rate; `max_steps` if the rate never falls."""
        if self.decay == "none":
            return max_steps
        if self.decay == "wsd":
            length = self.decay_fraction if self.decay_steps is None else self.decay_steps
            return max_steps - max(1, boundary_step(length, max_steps))
        return boundary_step(self.warmup, max_steps)

    def decay_end(self, max_steps: int) -> int:
        """The step at which the decay has reached min_lr_ratio; with wsd always the end of the run."""
        return max_steps if self.decay == "wsd" else boundary_step(self.decay_steps, max_steps)


@dataclass(frozen=True)
class TrainerConfig:
    GONE: ClassVar = {"shard": (False, "give trainer=fsdp")}

    max_steps: Count | Auto = "auto"
    batch_size: Count | Auto = "auto"
    grad_accum: Count | Auto = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    strategy: Literal["single", "ddp", "fsdp", "hsdp"] = "single"
    devices: Count | Auto = "auto"
    shard_size: Count | Auto = "auto"
    """Ranks that share master weights and moments. Once chosen, it is 1 for ddp and the number of devices for fsdp."""
    compile: bool | Auto = "auto"
    recompute: Literal["none", "block"] = "none"
    log_every: Count = 1
    eval_every: Natural | Auto = "auto"
    eval_tokens: Count | Auto = "auto"
    checkpoint_every: Natural | Auto = "auto"
    save_final: Literal["auto", "weights", "full", "none"] = "auto"
    peak_flops: Positive | None = None
    threads: Count | None = None
    collective_timeout_s: Positive = 600.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    profile: str | int | None = None
    """STEP:COUNT. YAML without quotes reads 10:3 as the number 603, which is refused with an explanation."""

    @property
    def profiled(self) -> tuple[int, int]:
        """STEP and COUNT of `profile`."""
        first, count = map(int, self.profile.split(":"))
        return first, count


LOGGERS = ("wandb", "tensorboard", "csv", "none")


@dataclass(frozen=True)
class LoggerConfig:
    kind: str = "wandb"
    """One of LOGGERS, or the dotted path of your own subclass of est_cli.tracking.tracker.Tracker."""
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "est"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointConfig:
    keep: Count = 2
    keep_best: bool = True
    at_boundaries: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run."""

    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    scheduler: SchedulerConfig
    sampling: SamplingConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    checkpoint: CheckpointConfig
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    kernels: Literal["auto", "torch", "triton", "masked"] = "auto"
    name: str = "est"
    run_id: str | None = None
    format: Format = "text"

    @property
    def sequences_per_step(self) -> int:
        """Global batch: sequences of one optimizer step, over all devices."""
        return self.trainer.batch_size * self.trainer.grad_accum * self.trainer.devices

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.data.seq_len

    @property
    def stages(self) -> tuple[Stage, ...]:
        return build_stages(self.scheduler.stages, self.trainer.max_steps, self.scheduler.boundary_keys)

    @property
    def lasting_checkpoints(self) -> frozenset[int]:
        """Steps whose checkpoints checkpoint.keep does not delete."""
        return frozenset(stage.end for stage in self.stages[:-1]) if self.checkpoint.at_boundaries else frozenset()


def option_that_gave(options: Mapping[str, Any], names: Iterable[str], index: int, value: Any) -> str | None:
    """The dotted key of the first option of these names that gives stage `index` the value."""
    for option in names:
        given = options.get(option)
        if isinstance(given, list) and given[index : index + 1] == [value]:
            return f"scheduler.{option}[{index}]"
        # A person's own stages may leave an option unused.
        if given is not None and given == value:
            return f"scheduler.{option}"
    return None


def as_plain(config: Any) -> Any:
    """Nested plain dicts and lists of a config dataclass, as `read_train_config` reads them."""
    if isinstance(config, SchedulerConfig):
        grow = {key: getattr(config, key) for key in GROW_KEYS}
        return {**config.options, **grow, "stages": as_plain(config.stages)}
    if dataclasses.is_dataclass(config):
        return {f.name: as_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [as_plain(item) for item in config] if isinstance(config, tuple) else config
