"""Plain command-line arguments of a case, for machines without Hydra; and back."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from est_cli.benchmark.case import Case
from est_cli.benchmark.peer import PEERS
from est_cli.config import Count, ModelConfig, Natural, OptimizerConfig, SamplingConfig
from est_cli.errors import UserError
from est_cli.schema import read
from est_cli.subnet.schedule import StageSpec

_GPT2 = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True, "tie_embeddings": True}
_LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "tie_embeddings": False}
_SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "vocab_size", "max_seq_len")
PRESETS: dict[str, dict[str, Any]] = {
    name: {**style, **dict(zip(_SIZES, sizes, strict=True)), "head_dim": sizes[3] // sizes[1]}
    for name, style, sizes in (
        ("nano", _LLAMA, (4, 4, 2, 128, 384, 4096, 256)),
        ("gpt2", _GPT2, (12, 12, 12, 768, 3072, 50304, 1024)),
        ("gpt2_medium", _GPT2, (24, 16, 16, 1024, 4096, 50304, 1024)),
        ("tinyllama", _LLAMA, (22, 32, 4, 2048, 5632, 32000, 2048)),
    )
}
"""conf/model's sizes where no YAML can be read; a test holds them equal."""

THREE_STAGES = [
    {"heads": 0.5, "mlp": 0.5, "layers": 0.5},
    {"heads": 0.5, "mlp": 0.5, "layers": 1.0},
    {"heads": 1.0, "mlp": 1.0, "layers": 1.0},
]


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser("python -m est_cli.benchmark", description=__doc__)
    arguments.add_argument("--model", type=_model, default="gpt2", help=f"{', '.join(PRESETS)}, or a JSON object")
    arguments.add_argument("--batch-size", type=int, default=4, help="sequences of a micro-batch")
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--grad-accum", type=int, default=1)
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--kernels", choices=("auto", "torch", "triton", "masked"), default="auto")
    arguments.add_argument("--recompute", action="store_true")
    arguments.add_argument("--compile", action="store_true", help="block by block; the peer whole")
    arguments.add_argument("--rates", type=json.loads, default=THREE_STAGES, help="JSON list, the full model last")
    arguments.add_argument("--sampling", type=json.loads, default={}, help="JSON object: mlp_block, gqa, ...")
    arguments.add_argument("--optimizer", type=json.loads, default={}, help="JSON object: unsampled, grad_clip, ...")
    arguments.add_argument("--peak-flops", type=float, default=None)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--warmup", type=int, default=2)
    arguments.add_argument("--against", choices=PEERS, default=None)
    arguments.add_argument("--against-path", default=None, help="the folder of nanoGPT, or of litgpt's package")
    arguments.add_argument("--format", choices=("json",), default="json", help="of what is printed")
    arguments.add_argument("--count-operations", action="store_true", help="count a step's operations; measure no time")
    arguments.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    arguments.add_argument("--peak-memory-of-stage", type=int, default=None, help="measure this and nothing else")
    return arguments


def _model(text: str) -> dict[str, Any]:
    try:
        return PRESETS.get(text) or json.loads(text)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{text}: must be {', '.join(PRESETS)}, or a JSON object of sizes") from None


def to_case(arguments: argparse.Namespace) -> Case:
    """Raises UserError with every problem."""
    problems: list[str] = []
    model = read(ModelConfig, arguments.model, "--model", problems)
    sampling = read(SamplingConfig, arguments.sampling, "--sampling", problems)
    optimizer = read(OptimizerConfig, arguments.optimizer, "--optimizer", problems)
    stages = read(tuple[StageSpec, ...], arguments.rates, "--rates", problems)
    for name in ("batch_size", "seq_len", "grad_accum", "rounds"):
        read(Count, getattr(arguments, name), f"--{name.replace('_', '-')}", problems)
    read(Natural, arguments.warmup, "--warmup", problems)
    if not problems and stages[-1:] != (StageSpec(),):
        problems.append(f"--rates={json.dumps(arguments.rates)}: the last must be the full model, {{}}")
    if problems:
        raise UserError(*problems)
    return Case(
        model.with_head_dim(),
        sampling,
        optimizer,
        stages,
        arguments.batch_size,
        arguments.seq_len,
        arguments.grad_accum,
        arguments.precision,
        arguments.device,
        arguments.kernels,
        arguments.recompute,
        arguments.compile,
        arguments.peak_flops,
    )


def to_arguments(case: Case) -> list[str]:
    """The command line that `to_case` reads back."""
    return [
        "--model",
        json.dumps(asdict(case.model)),
        "--batch-size",
        str(case.batch_size),
        "--seq-len",
        str(case.seq_len),
        "--grad-accum",
        str(case.grad_accum),
        "--precision",
        case.precision,
        "--device",
        case.device,
        "--kernels",
        case.kernels,
        "--rates",
        json.dumps([asdict(stage) for stage in case.stages]),
        "--sampling",
        json.dumps(asdict(case.sampling)),
        "--optimizer",
        json.dumps(asdict(case.optimizer)),
        *(["--recompute"] if case.recompute else []),
        *(["--compile"] if case.compile else []),
        *(["--peak-flops", str(case.peak_flops)] if case.peak_flops else []),
    ]
