"""Imports point one way, in the order of docs/architecture.md, and stand at the top: read from the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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
WITHOUT_TORCH = {*TIERS[0], "data", "reports"}
COMPOSING = {"composition", "runs", "experiments", "commands", "__main__"}
"""Only these know Hydra; everything below has plain dataclasses."""
HYDRA_INTERNALS = "est_cli.composition.hydra_internals"
ON_TOP = {"composition", "runs", "experiments", "commands", "evaluation", "reports", "tracking"}
LATE = {"transformers", "lm_eval", "tensorboard", "datasets", "pyarrow", "huggingface_hub", "tokenizers", "zstandard"}
"""Libraries that a function may import: optional ones, and those that only some kinds of data need."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


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
    assert part(name) in TIER, f"{part(name)} has no place in TIER"
    for other in own_imports(name):
        assert TIER[part(other)] <= TIER[part(name)], f"{name} imports {other}"


def test_no_module_imports_itself_by_a_detour():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in own_imports(name):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) in ON_TOP])
def test_imports_stand_at_the_top(name):
    """est_cli/lazy.py decides what is loaded late, and nothing else does."""
    nodes = ast.walk(ast.parse(MODULES[name].read_text()))
    for function in (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        late = set().union(*map(names_of, ast.walk(function)))
        assert {other.split(".")[0] for other in late} <= LATE, f"{name}.{function.name} imports {late}"


def test_hydras_private_modules_are_in_one_place():
    users = {name for name in MODULES if any(other.startswith("hydra._internal") for other in imported(name))}
    assert users == {HYDRA_INTERNALS}


def test_the_observers_of_the_loop_come_as_arguments():
    """Parts of one tier keep to themselves, so that each can be read, and installed, without the others."""
    for name in MODULES:
        if part(name) in {"tracking", "reports", "benchmark"}:
            others = {part(other) for other in own_imports(name)} & TIERS[3]
            assert others <= {part(name)}, f"{name} imports {others}"


@pytest.mark.parametrize("name", MODULES)
def test_libraries_are_known_only_where_they_are_needed(name):
    assert part(name) in COMPOSING or not libraries(name) & {"hydra", "omegaconf"}
    assert part(name) == "tracking" or "wandb" not in libraries(name)
    assert part(name) not in WITHOUT_TORCH or not libraries(name) & {"torch", "safetensors"}


@pytest.mark.parametrize("name", [n for n in MODULES if part(n) in {"subnet", "model", "kernels", "training"}])
def test_the_core_runs_with_torch_and_numpy_alone(name):
    """Below the commands a GPU machine needs no more; checkpoints are safetensors."""
    allowed = {"numpy", *({"torch"} if part(name) != "subnet" else ())}
    files = {f"est_cli.training.{name}" for name in ("checkpoint", "files", "nonfinite", "pretrained")}
    allowed |= {"safetensors"} if name in files else set()
    allowed |= {"triton"} if part(name) == "kernels" else set()
    assert libraries(name) - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "est_cli.config, est_cli.config.auto, est_cli.subnet.sampler, est_cli.subnet.memory",
            "torch, hydra, omegaconf, rich",
        ),
        ("est_cli.data.tokens, est_cli.data.hf_corpus", "torch, datasets"),
        ("est_cli.tracking.loggers, est_cli.tracking.summary", "torch, wandb, tensorboard"),
        ("est_cli.benchmark.gpu", "hydra, omegaconf, wandb, rich, safetensors, transformers, triton, pytest"),
        ("est_cli.training.loop", "hydra, omegaconf, wandb, rich, datasets, transformers, triton"),
    ],
)
def test_what_is_imported_stays_small(modules, absent):
    """The same, of a running interpreter: also through libraries."""
    program = f"import sys, {modules}\nprint([n for n in {absent.split(', ')!r} if n in sys.modules])"
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["--help"]),
        ("train", ["--cfg", "job"]),
        ("plan", []),
        ("report", ["format=nothing"]),
        ("evaluate", ["tokens=none"]),
    ],
    ids=["train --help", "train --cfg job", "plan", "a mistake for report", "a mistake for evaluate"],
)
def test_what_is_answered_without_training_needs_no_torch(command, arguments):
    heavy = ("torch", "matplotlib", "datasets", "wandb")
    program = (
        f"import atexit, sys; sys.argv = ['est-{command}', *{arguments}]\n"
        f"atexit.register(lambda: print([name for name in {heavy} if name in sys.modules]))\n"
        f"from est_cli.commands.{command} import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_map_of_the_house_names_files_that_exist():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    named = set(re.findall(r"\b[a-z_]+/[a-z_]+\.py\b", text)) | set(re.findall(r"`([a-z_]+/)`", text))
    places = (PACKAGE, PACKAGE.parent)
    assert len(named) > 20
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
