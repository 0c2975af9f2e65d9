"""Imports point one way, in the order of docs/architecture.md, and stand at the top: read from the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "est_cli"
TIERS = [
    {"errors", "units", "files", "lazy", "schema", "plugins", "config", "subnet"},
    {"model", "kernels", "data"},
    {"training"},
    {"evaluation", "benchmark", "tracking", "reports"},
    {"composition"},
    {"runs"},
    {"experiments"},
    {"commands", "__main__"},
]
TIER = {name: number for number, tier in enumerate(TIERS) for name in tier}
COMPOSING = {"composition", "runs", "experiments", "commands", "__main__"}
"""Only these know Hydra; everything below has plain dataclasses."""
BY_THEMSELVES = {"tracking", "reports", "benchmark"}
"""Parts that import nothing from their tier: each can be read, and installed, without the others."""
USERS = {"hydra": COMPOSING, "omegaconf": COMPOSING, "wandb": {"tracking"},
         "torch": TIER.keys() - TIERS[0] - {"data", "reports"}}  # fmt: skip
"""The parts that may import a library."""
CORE = {"subnet": {"numpy"}, "model": {"numpy", "torch"}, "kernels": {"numpy", "torch", "triton"},
        "training": {"numpy", "torch", "safetensors"}}  # fmt: skip
"""All libraries of the parts that train: a GPU machine needs no others."""
ON_TOP = {"composition", "runs", "experiments", "commands", "evaluation", "reports", "tracking"}
LATE = {"transformers", "lm_eval", "tensorboard", "datasets", "pyarrow", "huggingface_hub", "tokenizers"}
"""Libraries that a function may import: optional ones, and those that only some kinds of data need."""


PATHS = sorted(PACKAGE.rglob("*.py"))
DOTTED = (".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PATHS)
MODULES = {dotted.removesuffix(".__init__"): path for dotted, path in zip(DOTTED, PATHS, strict=True)}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node, but what only a type checker imports."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from statements(child)


def names_of(node: ast.AST) -> set[str]:
    """Dotted names that a statement imports: a.b of `from a import b` where that is a module of ours, else a."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, ast.unparse(node)
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return {name if name in MODULES else node.module for name in names}
    return set()


@cache
def imported(name: str) -> set[str]:
    """What a module imports, on first use too: `training.loop` after `from est_cli import training`."""
    nodes = list(statements(ast.parse(MODULES[name].read_text())))
    found = set().union(*map(names_of, nodes))
    used = {f"est_cli.{ast.unparse(node)}" for node in nodes if isinstance(node, ast.Attribute)}
    return found | {module for module in used if module in MODULES and module.rpartition(".")[0] in found}


def part(name: str) -> str:
    """The part of the house that a module of ours belongs to: config, subnet, model, ..."""
    return name.split(".")[1] if "." in name else ""


def own_imports(name: str) -> set[str]:
    return {other for other in imported(name) if other in MODULES and part(other)} - {name}


def libraries(name: str) -> set[str]:
    return {other.split(".")[0] for other in imported(name)} - {"est_cli"}


@pytest.mark.parametrize("name", [name for name in MODULES if part(name)])
def test_a_module_imports_only_from_its_own_tier_and_those_before(name):
    own = part(name)
    assert own in TIER, f"{own} has no place in TIER"
    for other in own_imports(name):
        assert TIER[part(other)] <= TIER[own], f"{name} imports {other}"
        assert own not in BY_THEMSELVES or part(other) == own or TIER[part(other)] < TIER[own], f"{name}: {other}"


def test_no_module_imports_itself_by_a_detour():
    TopologicalSorter({name: own_imports(name) for name in MODULES}).prepare()  # its CycleError shows the detour


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) in ON_TOP])
def test_imports_stand_at_the_top(name):
    """est_cli/lazy.py decides what is loaded late, and nothing else does."""
    nodes = ast.walk(ast.parse(MODULES[name].read_text()))
    for function in (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        late = set().union(*map(names_of, ast.walk(function)))
        assert {other.split(".")[0] for other in late} <= LATE, f"{name}.{function.name} imports {late}"


@pytest.mark.parametrize("name", MODULES)
def test_libraries_are_known_only_where_they_are_needed(name):
    used = libraries(name)
    for library, users in USERS.items():
        assert library not in used or part(name) in users, library
    assert used - set(sys.stdlib_module_names) <= CORE.get(part(name), used)
    if any(other.startswith("hydra._internal") for other in imported(name)):
        assert name == "est_cli.composition.hydra_internals"


def command(name: str, *arguments: str) -> tuple[str, str]:
    """One that answers without training."""
    program = f"sys.argv = {['est', *arguments]}; from est_cli.commands.{name} import main; main()"
    return program, "torch matplotlib datasets wandb"


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import est_cli.config.auto, est_cli.subnet.sampler, est_cli.subnet.memory", "torch hydra omegaconf rich"),
        ("import est_cli.data.tokens, est_cli.data.hf_corpus", "torch datasets"),
        ("import est_cli.tracking.loggers, est_cli.tracking.summary", "torch wandb tensorboard"),
        ("import est_cli.benchmark.gpu", "hydra omegaconf yaml wandb rich safetensors transformers triton pytest"),
        ("import est_cli.training.loop", "hydra omegaconf wandb rich datasets transformers triton"),
        command("train", "--help"),
        command("train", "--cfg", "job"),
        command("plan"),
        command("report", "format=nothing"),
        command("evaluate", "tokens=none"),
    ],
)
def test_what_is_loaded_stays_small(program, absent):
    """The same, of a running interpreter: also through libraries."""
    shown = f"print([name for name in {absent.split()} if name in sys.modules])"
    code = f"import atexit, sys; atexit.register(lambda: {shown}); {program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Traceback" not in done.stderr


def test_the_map_of_the_house_names_files_that_exist():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    named = set(re.findall(r"\b[a-z_]+/[a-z_]+\.py\b", text)) | set(re.findall(r"`([a-z_]+/)`", text))
    places = (PACKAGE, PACKAGE.parent)
    assert len(named) > 20
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
