"""What a config names and Python imports: functions, ours or a person's own (docs/extending.md), and extra packages."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping

from est_cli.errors import UserError, nearest


def named_function(name: str, known: Mapping[str, Callable], key: str, what: str = "function") -> Callable:
    """An entry of `known`, or the function (or class) that a dotted path imports. Raises UserError."""
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module or name.startswith("."):
        allowed = ", ".join(known)
        raise UserError(f"{key}={name}: must be one of {allowed}, or the dotted path of a {what}{nearest(name, known)}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}={name}: cannot be imported: {error}") from error
    if not callable(function):
        raise UserError(f"{key}={name}: must be a {what}, and is of type {type(function).__name__}")
    return function


def require_package(package: str, option: str, requirement: str, otherwise: str) -> None:
    """Raises UserError where `package`, which `option` needs, is not installed."""
    if not is_installed(package):
        raise UserError(f"{option}: {package} is not installed; `pip install '{requirement}'`, or say {otherwise}")


def is_installed(package: str) -> bool:
    """Whether the dotted `package` can be imported."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # a package that it lies in is missing
        return False
    # A folder of that name, as runs leave behind, is found too, but has no origin.
    return spec is not None and spec.origin is not None
