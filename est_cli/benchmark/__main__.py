"""python -m est_cli.benchmark: JSON on standard output; needs only torch and numpy, no Hydra."""

import argparse
import json
import sys
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from est_cli.benchmark.case import PRESETS, THREE_STAGES, Case
from est_cli.benchmark.measure import measure, peak_of_stage
from est_cli.benchmark.operations import count_operations
from est_cli.benchmark.peer import PEERS
from est_cli.config import Count, Natural, TrainerConfig
from est_cli.errors import UserError
from est_cli.schema import read
from est_cli.subnet.schedule import StageSpec
from est_cli.training.device import available_device

_STAGES = [asdict(stage) for stage in THREE_STAGES]


def main() -> None:
    commands = parser()
    arguments = commands.parse_args()
    try:
        print(json.dumps(_result(to_case(arguments), arguments), indent=1))
    except UserError as error:
        commands.error("\n".join(error.problems))


def _result(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    available_device(TrainerConfig(device=case.device), case.kernels)
    if arguments.peak_memory_of_stage is not None:
        return {"peak_memory_bytes": peak_of_stage(case, arguments.peak_memory_of_stage - 1)}
    if arguments.count_operations:
        return count_operations(case)
    return measure(
        case,
        arguments.rounds,
        arguments.warmup,
        arguments.against,
        arguments.against_path,
        memory=not arguments.no_memory,
        progress=lambda done, total: print(f"round {done} of {total}", file=sys.stderr),
    )


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser("python -m est_cli.benchmark", description=__doc__)
    arguments.add_argument("--case", type=json.loads, default=None, help="JSON: all of the case, in place of its parts")
    arguments.add_argument("--model", type=_model, default="gpt2", help=f"{', '.join(PRESETS)}, or a JSON object")
    arguments.add_argument("--batch-size", type=int, default=4, help="sequences of a micro-batch")
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--grad-accum", type=int, default=1)
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--kernels", choices=("auto", "torch", "triton", "masked"), default="auto")
    arguments.add_argument("--recompute", action="store_true")
    arguments.add_argument("--compile", action="store_true", help="block by block; the peer whole")
    arguments.add_argument("--rates", type=json.loads, default=_STAGES, help="JSON list, the full model last")
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
        return asdict(PRESETS[text]) if text in PRESETS else json.loads(text)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{text}: must be {', '.join(PRESETS)}, or a JSON object of sizes") from None


def to_case(arguments: argparse.Namespace) -> Case:
    """Raises UserError with every problem."""
    problems: list[str] = []
    read(Count, arguments.rounds, "--rounds", problems)
    read(Natural, arguments.warmup, "--warmup", problems)
    if arguments.case is not None:
        case = read(Case, arguments.case, "--case", problems)
    else:
        flags = {field.name: "rates" if field.name == "stages" else field.name for field in fields(Case)}
        values = {
            name: read(kind, getattr(arguments, flags[name]), f"--{flags[name].replace('_', '-')}", problems)
            for name, kind in get_type_hints(Case, include_extras=True).items()
            if name != "seed"
        }
        if not problems and values["stages"][-1:] != (StageSpec(),):
            problems.append(f"--rates={json.dumps(arguments.rates)}: the last must be the full model, {{}}")
        case = None if problems else Case(**values | {"model": values["model"].with_head_dim()})
    if problems:
        raise UserError(*problems)
    return case


if __name__ == "__main__":
    main()
