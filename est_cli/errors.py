"""What a command tells people: exit codes, the exceptions behind them, and the nearest match that messages offer."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

DONE, FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes. STOPPED: a signal ended the run after a checkpoint; the command that it prints continues."""
PROBLEM = "error: "
"""What a line of a message about bad input begins with."""


class UserError(ValueError):
    """Bad input. The outermost entry point prints `problems`, one a line, and exits with code 2.

    `problems` is empty if another process of the run prints them.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


@contextlib.contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Adds the problems of a UserError to `problems`, so that those of several steps can be raised together."""
    try:
        yield
    except UserError as error:
        problems += error.problems


class RunFailed(RuntimeError):
    """A run that ended for a reason it can name. The outermost entry point prints it and exits with code 1.

    The message is empty if another process of the run prints it.
    """


class PeerLost(RunFailed):
    """Another process of the run has ended, or hangs."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the entry of `allowed` closest to `word`, or an empty string."""
    matches = get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def problems_text(error: UserError) -> str:
    """One line per problem."""
    return "\n".join(f"{PROBLEM}{problem}" for problem in error.problems)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type's name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(message: str) -> None:
    """Report progress on standard error; standard output has only what was asked for."""
    print(message, file=sys.stderr, flush=True)
