"""python -m est_cli.benchmark: JSON on standard output; needs only torch and numpy, no Hydra."""

import argparse
import json
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from est_cli.benchmark.case import PRESETS, Case
from est_cli.benchmark.measure import measure, progress_line
from est_cli.benchmark.peer import PEERS
from est_cli.benchmark.steps import count_operations
from est_cli.config import Count, Natural, TrainerConfig
from est_cli.errors import UserError
from est_cli.schema import describe, read
from est_cli.subnet.schedule import StageSpec
from est_cli.training.device import available_device

_KINDS = get_type_hints(Case, include_extras=True)
_FLAGS = {field.name: field.name.replace("_", "-") for field in fields(Case) if field.name != "seed"}
_FLAGS["stages"] = "rates"
_HELP = {
    "model": f"{', '.join(PRESETS)}, or a JSON object",
    "batch_size": "sequences of a micro-batch",
    "compile": "block by block; the peer whole",
    "stages": "JSON list, the full model last",
    "sampling": "JSON object: mlp_block, gqa, ...",
    "optimizer": "JSON object: unsampled, grad_clip, ...",
}


def main() -> None:
    commands = parser()
    arguments = commands.parse_args()
    try:
        case = to_case(arguments)
        available_device(TrainerConfig(device=case.device), case.kernels)
        if arguments.count_operations:
            result = count_operations(case)
        else:
            options = {name: getattr(arguments, name) for name in ("rounds", "warmup", "against", "against_path")}
            result = measure(case, **options, memory=not arguments.no_memory, progress=progress_line("steps"))
    except UserError as error:
        commands.error("\n".join(error.problems))
    print(json.dumps(result, indent=1))


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser("python -m est_cli.benchmark", description=__doc__)
    flag = arguments.add_argument
    for name, spelled in _FLAGS.items():
        switch = {"nargs": "?", "const": True} if _KINDS[name] is bool else {}
        read_as = _model if name == "model" else _value
        flag(f"--{spelled}", dest=name, type=read_as, help=_HELP.get(name) or describe(_KINDS[name]), **switch)
    flag("--rounds", type=int, default=9)
    flag("--warmup", type=int, default=2)
    flag("--against", choices=PEERS)
    flag("--against-path", help="the folder of nanoGPT, or of litgpt's package")
    flag("--format", choices=("json",), default="json", help="of what is printed")
    flag("--count-operations", action="store_true", help="count a step's operations; measure no time")
    flag("--no-memory", action="store_true", help="do not measure peak memory")
    arguments.set_defaults(model=asdict(PRESETS["gpt2"]))
    return arguments


def _value(text: str) -> Any:
    """JSON, or a word without its quotes."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _model(text: str) -> Any:
    value = asdict(PRESETS[text]) if text in PRESETS else _value(text)
    if isinstance(value, str):
        raise argparse.ArgumentTypeError(f"{text}: must be {_HELP['model']} of sizes")
    return value


def to_case(arguments: argparse.Namespace) -> Case:
    """Raises UserError with every problem."""
    problems: list[str] = []
    read(Count, arguments.rounds, "--rounds", problems)
    read(Natural, arguments.warmup, "--warmup", problems)
    given = {name: value for name in _FLAGS if (value := getattr(arguments, name)) is not None}
    values = {name: read(_KINDS[name], value, f"--{_FLAGS[name]}", problems) for name, value in given.items()}
    if (stages := values.get("stages")) is not None and stages[-1:] != (StageSpec(),):
        problems.append(f"--rates={json.dumps(given['stages'])}: the last must be the full model, {{}}")
    if problems:
        raise UserError(*problems)
    return Case(**values | {"model": values["model"].with_head_dim()})


if __name__ == "__main__":
    main()
