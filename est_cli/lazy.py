"""Imports a package's modules on first use: the one place that decides what a command loads, and when.

A package whose `__init__` says `__getattr__ = on_demand(__name__)` costs nothing to import. What must start without
torch, such as --help and est-plan, imports such a package (`from est_cli import training`) and names the module where
it is used (`training.loop.Training`). Modules that need torch anyway import what they use by name. In both cases the
imports stand at the top of the file, and tests/test_imports.py reads from them what depends on what.
"""

import importlib
from collections.abc import Callable
from types import ModuleType


def on_demand(package: str) -> Callable[[str], ModuleType]:
    """The `__getattr__` of `package`, as PEP 562 has it."""

    def module(name: str) -> ModuleType:
        dotted = f"{package}.{name}"
        try:
            return importlib.import_module(dotted)
        except ModuleNotFoundError as error:
            if error.name != dotted:
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None

    return module
