"""What every command shares: flags, requests, help, exit codes.

A command's `main` reads the flags, composes the config and calls the command's `run`. However it ends, the process
leaves with the contract's exit code and one message.
"""

import argparse
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NoReturn, TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf

import est_cli
from est_cli.composition.composer import Composer, conf_dir, plain
from est_cli.composition.hydra_internals import hydra_flags
from est_cli.composition.typed_text import as_typed
from est_cli.config import TrainConfig, read_train_config
from est_cli.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    PROBLEM,
    RunFailed,
    UserError,
    collecting,
    problems_text,
)
from est_cli.schema import read
from est_cli.tracking.display import LastingFile

AddFlags = Callable[[argparse.ArgumentParser], None]
"""Adds the flags that only one command has."""
_Request = TypeVar("_Request")
_KEY = re.compile(r"(?P<indent>|  )(?P<key>\w+):")
"""A key of the composed config, or of one of its sections."""
_COMMENTED = re.compile(r"(?P<key>\w+):.*?\s# (?P<comment>.+)")
_COMMENT_COLUMN = 34


def run_composed(config_name: str, call: Callable[[dict[str, Any]], None]) -> NoReturn:
    """The `main` of a command that makes no run directory: compose, `call` with the plain config, exit.

    With -m, `call` gets the config of every job.
    """
    arguments = read_arguments()

    def command() -> None:
        with Composer(config_name, arguments) as composer:
            if answers_flag(composer):
                return
            if arguments.multirun:
                composer.compose_sweep()
                composer.run(lambda config: call(plain(config)))
                return
            composed = plain(composer.compose())
        call(composed)

    exit_with(command)


def read_arguments(add_flags: AddFlags | None = None) -> argparse.Namespace:
    """Hydra's flags and the overrides of the command line.

    Also appends the current directory to the path, so that a config can name a person's own functions there, as with
    python -m. It is the last entry, so local files cannot shadow installed packages.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    open_standard_streams()
    # Figures only go to files. A notebook's own backend need not exist here.
    os.environ["MPLBACKEND"] = "agg"
    parser = hydra_flags()
    versions = f"est-cli {est_cli.__version__} (Hydra {hydra.__version__})"
    next(action for action in parser._actions if action.dest == "version").version = versions
    if add_flags is not None:
        add_flags(parser)
    arguments = parser.parse_intermixed_args()
    arguments.overrides = as_typed(arguments.overrides, arguments.multirun)
    return arguments


def open_standard_streams() -> None:
    """Open standard streams that the caller closed (`>&-`), and ignore failed writes to standard error.

    A run's results are in its folder, so no message may end it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # taken, so that no file of the run gets the number of a standard stream
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    elif sys.stderr is sys.__stderr__ and not isinstance(sys.stderr, LastingFile):
        sys.stderr = sys.__stderr__ = LastingFile(sys.stderr)


def read_request(kind: type[_Request], composed: Mapping[str, Any], **required: str) -> _Request:
    """The composed keys as the frozen dataclass `kind`. `required` says what a key must be that has no default.

    Raises UserError with every problem.
    """
    problems = [f"{key}: is missing; must be {what}" for key, what in required.items() if not composed.get(key)]
    request = read(kind, composed, "", problems)
    if problems:
        raise UserError(*problems)
    return request


def read_request_and_config(
    kind: type[_Request], composed: Mapping[str, Any], problems: Sequence[str] = ()
) -> tuple[_Request, TrainConfig]:
    """The keys that are fields of `kind`, and the rest as a run's config. Raises UserError with every problem."""
    found = list(problems)
    names = {field.name for field in dataclasses.fields(kind)}
    request = read(kind, {key: value for key, value in composed.items() if key in names}, "", found)
    with collecting(found):
        config = read_train_config({key: value for key, value in composed.items() if key not in names})
    if found:
        raise UserError(*found)
    return request, config


def folders_of(named: str | Sequence[str]) -> list[Path]:
    """The folders that `run=` or `runs=` names: one, or a list."""
    return [Path(folder).expanduser() for folder in ([named] if isinstance(named, str) else named)]


def results_folder(out: str | None, folders: Sequence[Path], name: str) -> Path:
    """`out`, or NAME in the run's folder; NAME in the current folder if there are several runs."""
    if out:
        return Path(out).expanduser()
    return folders[0] / name if len(folders) == 1 else Path(name)


def exit_with(call: Callable[[], int | None]) -> NoReturn:
    """Run a command and leave with the contract's exit code."""
    try:
        code = call() or DONE
    except UserError as error:
        if error.problems:
            print(problems_text(error), file=sys.stderr)
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
        # How rich ends the process when the reader has left: est-plan | head.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = DONE
    except Exception:
        traceback.print_exc()
        code = FAILED
    sys.stdout.flush()
    sys.exit(code)


def answers_flag(composer: Composer) -> bool:
    """Whether a flag asks for words (--help, --hydra-help, --cfg, --info, --shell-completion), which are then printed.

    Raises UserError, also for overrides that cannot be composed: Hydra would report them in its own words and exit
    with 1.
    """
    arguments, name, overrides = composer.arguments, composer.config_name, composer.arguments.overrides
    given = [f"--{flag}" for flag in ("multirun", "cfg", "info", "shell_completion") if getattr(arguments, flag)]
    if len(given) > 1:
        raise UserError(f"{' '.join(given)}: only one of them at a time")
    if arguments.resolve and not (arguments.cfg or arguments.help):
        raise UserError("--resolve: goes with --cfg")
    if arguments.help:
        print(help_text(composer))
    elif arguments.hydra_help:
        composer.hydra.hydra_help(name, hydra_flags(), arguments)
    elif arguments.shell_completion:
        composer.hydra.shell_completion(name, overrides)
    elif arguments.cfg:
        config = composer.compose()
        if arguments.resolve:
            plain(config)  # raises UserError for a value that cannot be resolved
        composer.hydra.show_cfg(name, overrides, arguments.cfg, arguments.package, arguments.resolve)
    elif arguments.info:
        composer.compose()
        composer.hydra.show_info(arguments.info, name, overrides)
    else:
        return False
    return True


def help_text(composer: Composer) -> str:
    """What the command does, its config groups, and the composed config. Raises UserError for bad overrides."""
    config = composer.compose()
    groups = composer.hydra.format_config_groups(lambda name: not name.startswith("hydra"))
    keys = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    template = Template(config.hydra.help.template)
    return template.substitute(APP_CONFIG_GROUPS=groups, CONFIG=_annotated(keys, _comments(composer, config)))


def _annotated(yaml: str, comments: dict[str, str]) -> str:
    """The lines of a composed config, each with the comment of its key."""
    lines, section = [], ""
    for line in yaml.splitlines():
        comment = None
        if found := _KEY.match(line):
            section = section if found["indent"] else found["key"]
            comment = comments.get(f"{section}.{found['key']}" if found["indent"] else section)
        lines.append(line if comment is None else f"{line:<{_COMMENT_COLUMN}}# {comment}")
    return "\n".join(lines) + "\n"


def _comments(composer: Composer, config: DictConfig) -> dict[str, str]:
    """The comments behind the keys in conf/, by `key` and `section.key`; the chosen option's before other options'."""
    files = [("", conf_dir() / f"{name}.yaml") for name in (composer.config_name, "base")]
    for group, option in config.hydra.runtime.choices.items():
        if "/" not in group:
            folder = conf_dir() / group
            files += [(f"{group}.", path) for path in (folder / f"{option}.yaml", *sorted(folder.glob("*.yaml")))]
    comments: dict[str, str] = {}
    for prefix, path in files:
        for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
            if found := _COMMENTED.match(line):
                comments.setdefault(prefix + found["key"], found["comment"])
    return comments
