"""The outermost entry point of every command: flags, composition, exit codes."""

import argparse
import contextlib
import functools
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

import est_cli
from est_cli.commands.composition import Composer, conf_dir, plain
from est_cli.commands.help import help_text
from est_cli.commands.typed_text import as_typed
from est_cli.errors import RunFailed, UserError

DONE, FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
PROBLEM = "error: "
"""What a line of a message about bad input begins with."""


@functools.cache
def run_id() -> str:
    """The job's id where a scheduler gives one, so that a requeued job finds its run; else a fresh one."""
    environment = os.environ
    if job := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{job}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    if job := environment.get("SLURM_JOB_ID"):
        return job
    if (job := environment.get("TORCHELASTIC_RUN_ID", "none")) != "none":
        return job
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"


def wandb_setting(variable: str, default: str | None) -> str | None:
    """What W&B's own environment variable asks for; what is given on the command line comes before it."""
    value = os.environ.get(variable) or default
    if variable != "WANDB_MODE":
        return value
    value = {"dryrun": "offline", "run": "online"}.get(value, value)
    if value not in ("offline", "online", "disabled"):
        raise UserError(f"WANDB_MODE={value}: must be offline, online or disabled; logger.mode=... comes before it")
    return value


OmegaConf.register_new_resolver("est.run_id", run_id, replace=True)
OmegaConf.register_new_resolver("est.wandb", wandb_setting, replace=True)


class _Lossy(io.TextIOWrapper):
    """A stream of messages that nobody may be able to read: what cannot be written is dropped."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().flush()


def open_standard_streams() -> None:
    """Open what the caller closed (`>&-`), and let messages on standard error be lost, on a full disk for example.

    A run's results are in its folder; no message may end it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # taken, so that no file of the run gets the number of a standard stream
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    elif sys.stderr is sys.__stderr__ and not isinstance(sys.stderr, _Lossy):
        encoding = sys.stderr.encoding
        buffer = sys.stderr.detach()
        sys.stderr = sys.__stderr__ = _Lossy(buffer, encoding, "backslashreplace", line_buffering=True)


def read_arguments(trains: bool = False) -> argparse.Namespace:
    """Hydra's flags and the overrides of the command line; with `trains` also --rerun and --cooldown.

    Also lets a config name a person's own functions by a dotted path: an installed command, unlike python -m, does
    not look for modules in the current directory. It comes last, so that no file there can take a library's place.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    open_standard_streams()
    # Figures only go to files. A notebook's own backend need not exist here.
    os.environ["MPLBACKEND"] = "agg"
    parser = get_args_parser()
    versions = f"est-cli {est_cli.__version__} (Hydra {hydra.__version__})"
    next(action for action in parser._actions if action.dest == "version").version = versions
    if trains:
        add_own_flags(parser)
    arguments = parser.parse_intermixed_args()
    arguments.overrides = as_typed(arguments.overrides, arguments.multirun)
    return arguments


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that Hydra does not know: which recorded config is the primary one."""
    parser.add_argument("--rerun", metavar="DIR")
    parser.add_argument("--cooldown", metavar="CHECKPOINT")


def read_only(config_name: str, call: Callable[[dict[str, Any]], int | None]) -> NoReturn:
    """A command that makes no run directory: compose, then `call(plain config)`."""
    arguments = read_arguments()

    def task(config: DictConfig) -> None:
        call(plain(config))

    if needs_hydra(arguments):
        hand_to_hydra(config_name, arguments, task)
    exit_with(lambda: call(compose(config_name, arguments)[0]))


def compose(config_name: str, arguments: Any) -> tuple[dict[str, Any], DictConfig]:
    """The plain config, and Hydra's own node. Raises UserError."""
    with Composer(config_name, arguments) as composer:
        config = composer.compose()
        return plain(config), config.hydra


def exit_with(call: Callable[[], int | None]) -> NoReturn:
    """Run a command and leave with the contract's exit code."""
    try:
        code = call() or DONE
    except UserError as error:
        print_problems(error)
        code = BAD_INPUT
    except RunFailed as error:
        if str(error):
            print(f"{PROBLEM}{error}", file=sys.stderr)
        code = FAILED
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except SystemExit as error:
        # rich ends the process so where the reader has left: est-plan | head.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = DONE
    except Exception:
        traceback.print_exc()
        code = FAILED
    sys.stdout.flush()
    sys.exit(code)


def say(message: str) -> None:
    """Tell how it goes, on standard error: standard output is for what was asked for."""
    print(message, file=sys.stderr, flush=True)


def print_problems(error: UserError) -> None:
    """One message on standard error, a line a problem."""
    if error.problems:
        print(problems_text(error), file=sys.stderr)


def problems_text(error: UserError) -> str:
    return "\n".join(f"{PROBLEM}{problem}" for problem in error.problems)


def needs_hydra(arguments: Any) -> bool:
    """Whether a flag asks for what Hydra does itself, sweeps included."""
    return arguments.multirun or asks_hydra(arguments)


def asks_hydra(arguments: Any) -> bool:
    """Whether a flag asks for words of Hydra's: help, --cfg, --info."""
    flags = ("help", "hydra_help", "cfg", "info", "shell_completion", "resolve")
    return any(getattr(arguments, flag) for flag in flags)


def hand_to_hydra(config_name: str, arguments: Any, task: Callable[[DictConfig], Any]) -> NoReturn:
    if arguments.help:
        exit_with(lambda: print(help_text(config_name, arguments)))
    exit_with(lambda: _check_and_run_hydra(config_name, arguments, task))


def _check_and_run_hydra(config_name: str, arguments: argparse.Namespace, task: Callable[[DictConfig], Any]) -> None:
    """Raises UserError for a mistake: Hydra would tell of it in its own words, and exit with 1."""
    alone = [f"--{flag}" for flag in ("multirun", "cfg", "info", "shell_completion") if getattr(arguments, flag)]
    if len(alone) > 1:
        raise UserError(f"{' '.join(alone)}: only one of them at a time")
    if not (arguments.hydra_help or arguments.shell_completion):
        with Composer(config_name, arguments) as composer:
            composer.compose_sweep() if arguments.multirun else composer.compose()
    run_hydra(config_name, task)


def run_in_directory(config_name: str, arguments: argparse.Namespace, task: Callable[[DictConfig], int]) -> int:
    """Hydra makes the run directory, and calls `task` with the composed config; returns what that returns."""
    outcome: list[int] = []
    with Composer(config_name, arguments) as composer, _passed_by_hydra(task) as guarded:
        composer.hydra.run(composer.config_name, lambda config: outcome.append(guarded(config)), arguments.overrides)
    return outcome[0]


def run_hydra(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Hydra's own main.

    A UserError and a RunFailed pass through, where Hydra would print a traceback and exit with 1.
    """
    # Hydra parses the command line itself.
    sys.argv[1:] = [text if text.startswith("-") else as_typed([text])[0] for text in sys.argv[1:]]
    with _passed_by_hydra(task) as guarded:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(guarded)()


@contextlib.contextmanager
def _passed_by_hydra(task: Callable[[DictConfig], Any]) -> Iterator[Callable[[DictConfig], Any]]:
    """The task for Hydra to call; what it raises is raised in the end, past Hydra's own words on errors."""
    errors: list[Exception] = []

    def guarded(config: DictConfig) -> Any:
        try:
            return task(config)
        except Exception as error:
            errors.append(error)

    yield guarded
    if errors:
        raise errors[0]
