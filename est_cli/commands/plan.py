"""est-plan: what a run would cost, without torch."""

import json
import shlex
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from est_cli.commands.entry import read_request_and_config, run_composed
from est_cli.config import TrainConfig, auto
from est_cli.errors import UserError
from est_cli.subnet.flops import config_ledger, scale_boundaries
from est_cli.subnet.memory import count_parameters, sent_bytes, training_bytes
from est_cli.subnet.plan import effective_rates, stage_models
from est_cli.subnet.sampler import check_strategy, sample
from est_cli.subnet.schedule import StageSpec, stage_at
from est_cli.tracking.summary import narrow_table
from est_cli.units import format_bytes, format_count, format_flops, format_percent, parse_bytes

COUNTS = {"heads": "n_heads", "mlp": "d_ff", "layers": "n_layers"}
"""What is sampled, and the key of the model that counts it."""
_LONGEST = 40
"""Characters of a list of indices that people are shown."""


@dataclass(frozen=True)
class Request:
    step: int | None
    target_saved_blocks: float | None
    device_memory: int | None
    """Bytes."""


def main() -> None:
    run_composed("plan", run)


def run(composed: dict[str, Any]) -> None:
    """Print the plan of the composed config; raises UserError for bad input."""
    problems, memory = [], composed.get("device_memory")
    if memory is not None:
        try:
            composed["device_memory"] = parse_bytes(str(memory))
        except ValueError as error:
            problems.append(f"device_memory={memory}: {error}")
            composed["device_memory"] = None
    request, config = read_request_and_config(Request, composed, problems)
    if request.device_memory is not None and config.trainer.device == "auto":
        config = replace(config, trainer=replace(config.trainer, device="cuda"))
    config, notes = auto.choose(config, auto.expected_device(config))
    check_strategy(config)
    console = Console()
    if request.target_saved_blocks is not None:
        _solve(config, request.target_saved_blocks, console)
    elif request.step is not None:
        _print_step(config, request.step, console)
    elif config.format == "json":
        print(json.dumps(describe(config, request.device_memory)))
    else:
        _print_plan(config, notes, console, request.device_memory)


def describe(config: TrainConfig, device_memory: int | None = None) -> dict[str, Any]:
    """The contract's JSON of est-plan."""
    ledger, steps, needed = config_ledger(config), config.trainer.max_steps, training_bytes(config)
    fits = {} if device_memory is None else {"device_memory_bytes": device_memory, "fits": needed <= device_memory}
    return {
        "params": count_parameters(config.model).total,
        "steps": steps,
        "saved": ledger.saved(steps),
        "saved_blocks": ledger.saved_blocks(steps),
        "memory_bytes": needed,
        **fits,
        "stages": [
            {
                "stage": stage.number,
                "first_step": stage.first_step,
                "last_step": stage.last_step,
                "rates": vars(stage.rates),
                "grown": {key: getattr(grown, key) for key in vars(stage.grown)},
                "effective_rates": vars(effective_rates(config.model, config.sampling, stage)),
                "tokens": stage.steps * config.tokens_per_step,
                "flops_per_step": cost.total,
                "saved": ledger.stage_saved(stage.number),
                "saved_blocks": ledger.stage_saved_blocks(stage.number),
                "sent_bytes_per_step": sent_bytes(config, stage),
            }
            for stage, cost, grown in zip(ledger.stages, ledger.per_step, stage_models(config), strict=True)
        ],
    }


def _print_plan(config: TrainConfig, notes: list[str], console: Console, device_memory: int | None) -> None:
    facts, devices = describe(config, device_memory), config.trainer.devices
    table = narrow_table(
        title=f"{config.name}: {format_count(facts['params'])} parameters, {facts['steps']:,} steps of "
        f"{config.tokens_per_step:,} tokens",
        title_justify="left",
    )
    table.add_column("stage", no_wrap=True)
    for column in ("steps", "tokens", "heads", "mlp", "layers", "FLOPs/step", "saved", "saved,\nblocks"):
        # Where the window is narrow, only the rates may wrap: they are two numbers.
        table.add_column(column, justify="right", no_wrap=column not in COUNTS, min_width=len(column.split("\n")[0]))
    for stage in facts["stages"]:
        table.add_row(
            str(stage["stage"]),
            f"{stage['first_step']}-{stage['last_step']}",
            format_count(stage["tokens"]),
            *(_rate(stage, name, key, getattr(config.model, key)) for name, key in COUNTS.items()),
            format_flops(stage["flops_per_step"]),
            format_percent(stage["saved"]),
            format_percent(stage["saved_blocks"]),
        )
    console.print(table)
    total = config_ledger(config).spent(facts["steps"]).total
    console.print(
        f"FLOPs {format_flops(total)}; saved {facts['saved']:.2%} of the whole model's, "
        f"{facts['saved_blocks']:.2%} of the blocks' (the paper's accounting)"
    )
    console.print(
        f"memory, estimated: {format_bytes(facts['memory_bytes'])} on {config.trainer.device} "
        f"({config.trainer.precision}, {config.trainer.batch_size} sequences of {config.data.seq_len})"
        f"{f', on each of {devices} devices' if devices > 1 else ''}"
    )
    if device_memory is not None:
        left = device_memory - facts["memory_bytes"]
        words = f"fits, {format_bytes(left)} left" if left >= 0 else f"does not fit, {format_bytes(-left)} too much"
        if left < 0 and (least := _with_less_memory(config)) != config:
            before, after = vars(config.trainer), vars(least.trainer)
            given = [f"trainer.{key}={after[key]}" for key in ("batch_size", "recompute") if after[key] != before[key]]
            given += [f"trainer={after['strategy']}"] if after["strategy"] != before["strategy"] else []
            words += f"; {' '.join(given)}: {format_bytes(training_bytes(least))}"
        console.print(f"device_memory={format_bytes(device_memory)}: {words}", highlight=False)
    if devices > 1:
        _print_trainers(config, console)
    for note in notes:
        console.print(note, style="dim")


def _print_trainers(config: TrainConfig, console: Console) -> None:
    """What each way to train on these devices needs, the run's own among them."""
    table = Table("trainer", "memory a device", "each device sends in a step of each stage", box=box.SIMPLE_HEAD)
    for strategy in ("ddp", "fsdp", "hsdp"):
        try:
            other = auto.on_devices(config, strategy)
        except UserError:
            continue  # the devices cannot share this model
        name = f"hsdp, {other.trainer.shard_size} a machine" if strategy == "hsdp" else strategy
        sent = ", ".join(format_bytes(sent_bytes(other, stage)) for stage in other.stages)
        style = "bold" if strategy == config.trainer.strategy else None
        table.add_row(name, format_bytes(training_bytes(other)), sent, style=style)
    console.print(table, highlight=False)


def _with_less_memory(config: TrainConfig) -> TrainConfig:
    """The run with settings of the trainer that need less memory, for the same model."""
    least = replace(config, trainer=replace(config.trainer, batch_size=1, recompute="block"))
    try:
        return least if config.trainer.devices == 1 else auto.on_devices(least, "fsdp")
    except UserError:
        return least


def _rate(stage: dict[str, Any], name: str, key: str, total: int) -> str:
    """The rate, also as rounded to whole units if that differs; `4 of 8` until all units have joined."""
    requested, effective, grown = stage["rates"][name], stage["effective_rates"][name], stage["grown"][key]
    if grown < total:
        return f"{round(effective * total)} of {total}"
    return f"{requested:g}" if abs(requested - effective) < 5e-4 else f"{requested:g} → {effective:.3g}"


def _print_step(config: TrainConfig, step: int, console: Console) -> None:
    """The sampled indices of one step, as the run uses them."""
    if not 0 <= step < config.trainer.max_steps:
        raise UserError(
            f"step={step}: must be an integer in [0, {config.trainer.max_steps - 1}] "
            f"(trainer.max_steps={config.trainer.max_steps})"
        )
    stage = stage_at(config.stages, step)
    plan = sample(config.seed, step, stage, config.model, config.sampling)
    if config.format == "json":
        print(json.dumps({"step": step, "stage": stage.number, **plan.as_dict()}))
        return
    console.print(f"step {step}, stage {stage.number}: layers {_ranges(plan.layers)}")
    table = Table("layer", "heads", "key/value heads", f"neurons, {plan.neurons.shape[1]} each", box=box.SIMPLE_HEAD)
    for layer, *units in zip(plan.layers.tolist(), plan.heads, plan.kv_heads, plan.neurons, strict=True):
        table.add_row(str(layer), *(shorten(_ranges(indices), _LONGEST, placeholder=" …") for indices in units))
    console.print(table)
    console.print("format=json lists every index", style="dim")


def _stage_override(spec: StageSpec) -> str:
    """`{end:0.2,heads:0.5}`: as an override has it."""
    full = vars(StageSpec())
    return "{" + ",".join(f"{key}:{value}" for key, value in vars(spec).items() if value != full[key]) + "}"


def _ranges(indices: np.ndarray) -> str:
    """Sorted indices with runs joined: 0-3 7 9-10."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _solve(config: TrainConfig, target: float, console: Console) -> None:
    moved = scale_boundaries(config, target)
    facts = describe(moved)
    names, stages = config.scheduler.boundary_keys, moved.scheduler.stages[:-1]
    overrides = [f"{name}={stage.end}" for name, stage in zip(names, stages, strict=False)]
    if any(override.startswith("scheduler.stages") for override in overrides):
        overrides = [f"scheduler.stages=[{','.join(map(_stage_override, moved.scheduler.stages))}]"]
    if config.format == "json":
        print(json.dumps({"overrides": overrides, **facts}))
        return
    print(shlex.join(overrides))
    console.print(
        f"saves {facts['saved_blocks']:.2%} of the blocks' FLOPs (the paper's accounting), "
        f"{facts['saved']:.2%} of the whole model's",
        style="dim",
    )
