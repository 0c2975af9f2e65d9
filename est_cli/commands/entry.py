"""What every command shares: flags, composition, help, exit codes.

A command's `main` reads the flags and either answers what they ask (--help, --cfg, --info) or composes the config and
calls the command. Whatever happens, the process ends with the contract's exit code and one message.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

import est_cli
from est_cli.composition import hydra_internals
from est_cli.composition.composer import Composer, compose, conf_dir, plain
from est_cli.composition.typed_text import as_typed
from est_cli.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, PROBLEM, RunFailed, UserError, problems_text

AddFlags = Callable[[argparse.ArgumentParser], None]
"""Adds the flags that only one command has."""
_KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):")
_COMMENTED = re.compile(r"(?P<key>\w+):.*?\s# (?P<comment>.+)")
_COMMENT_COLUMN = 34


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


def read_arguments(add_flags: AddFlags | None = None) -> argparse.Namespace:
    """Hydra's flags and the overrides of the command line.

    Also puts the current directory on the path, so that a config can name a person's own functions there, as with
    python -m. Appended last, so local files cannot shadow installed packages.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    open_standard_streams()
    # Figures only go to files. A notebook's own backend need not exist here.
    os.environ["MPLBACKEND"] = "agg"
    parser = hydra_internals.hydra_flags()
    versions = f"est-cli {est_cli.__version__} (Hydra {hydra.__version__})"
    next(action for action in parser._actions if action.dest == "version").version = versions
    if add_flags is not None:
        add_flags(parser)
    arguments = parser.parse_intermixed_args()
    arguments.overrides = as_typed(arguments.overrides, arguments.multirun)
    return arguments


def read_only(config_name: str, call: Callable[[dict[str, Any]], int | None]) -> NoReturn:
    """A command that makes no run directory: compose, then `call(plain config)`."""
    arguments = read_arguments()

    def task(config: DictConfig) -> None:
        call(plain(config))

    if needs_hydra(arguments):
        hand_to_hydra(config_name, arguments, task)
    exit_with(lambda: call(compose(config_name, arguments)[0]))


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


def print_problems(error: UserError) -> None:
    """One message on standard error, a line a problem."""
    if error.problems:
        print(problems_text(error), file=sys.stderr)


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


def help_text(config_name: str, arguments: Any) -> str:
    """What the command does, its config groups, and the composed config. Raises UserError for bad overrides."""
    with Composer(config_name, arguments) as composer:
        config = composer.compose()
        groups = composer.hydra.format_config_groups(lambda name: not name.startswith("hydra"))
    keys = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    top_level = _comments([conf_dir() / f"{name}.yaml" for name in (config_name, "base")])
    sections = {
        group: _comments([conf_dir() / group / f"{option}.yaml", *sorted((conf_dir() / group).glob("*.yaml"))])
        for group, option in config.hydra.runtime.choices.items()
        if "/" not in group
    }
    template = Template(config.hydra.help.template)
    return template.substitute(APP_CONFIG_GROUPS=groups, CONFIG=_annotated(keys, top_level, sections))


def _annotated(yaml: str, top_level: dict[str, str], sections: dict[str, dict[str, str]]) -> str:
    """The lines of a composed config, each with the comment of its key."""
    lines, section = [], {}
    for line in yaml.splitlines():
        comment = None
        if found := _KEY.match(line):
            depth, key = len(found["indent"]) // 2, found["key"]
            if depth == 0:
                section, comment = sections.get(key, {}), top_level.get(key)
            elif depth == 1:
                comment = section.get(key)
        lines.append(line if comment is None else f"{line:<{_COMMENT_COLUMN}}# {comment}")
    return "\n".join(lines) + "\n"


def _comments(paths: list[Path]) -> dict[str, str]:
    """The comment behind each key; of several files the first that has one."""
    comments: dict[str, str] = {}
    for path in filter(Path.is_file, paths):
        for line in path.read_text("utf-8").splitlines():
            if found := _COMMENTED.match(line):
                comments.setdefault(found["key"], found["comment"])
    return comments
