"""python -m est_cli.benchmark: JSON on standard output; needs torch and numpy alone."""

import json
import sys

from est_cli.benchmark.arguments import parser, to_case
from est_cli.benchmark.measure import measure, peak_of_stage
from est_cli.benchmark.operations import count_operations
from est_cli.config import TrainerConfig
from est_cli.errors import UserError
from est_cli.training.device import available_device


def main() -> None:
    commands = parser()
    arguments = commands.parse_args()
    try:
        case = to_case(arguments)
        available_device(TrainerConfig(device=case.device), case.kernels)
    except UserError as error:
        commands.error("\n".join(error.problems))
    if arguments.peak_memory_of_stage is not None:
        print(json.dumps({"peak_memory_bytes": peak_of_stage(case, arguments.peak_memory_of_stage - 1)}))
        return
    if arguments.count_operations:
        print(json.dumps(count_operations(case), indent=1))
        return
    try:
        result = measure(
            case,
            arguments.rounds,
            arguments.warmup,
            arguments.against,
            arguments.against_path,
            memory=not arguments.no_memory,
            progress=lambda done, total: print(f"round {done} of {total}", file=sys.stderr),
        )
    except UserError as error:
        commands.error("\n".join(error.problems))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
