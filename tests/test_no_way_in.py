"""Nothing that is read runs code, and nothing that is secret is written: held by the source itself."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_imports import MODULES

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
UNSAFE_YAML = {"load", "full_load", "unsafe_load", "load_all"}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_unpickles_evaluates_text_or_trusts_code_from_a_hub(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_IMPORTS
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_IMPORTS
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert function not in FORBIDDEN_CALLS, f"{name}, line {node.lineno}"
            assert function not in {"torch.load", "torch.save", "np.load", "numpy.load"}, f"{name}, line {node.lineno}"
            assert function not in {f"yaml.{word}" for word in UNSAFE_YAML}, f"{name}, line {node.lineno}"
            assert not any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords), name
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False", name
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                trusts = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                assert not trusts or ast.unparse(value) == "False", name


def test_the_source_holds_no_secret():
    """Whatever looks like a key: 40 hexadecimal digits, as W&B's, or the hub's hf_…"""
    root = Path(__file__).parents[1]
    for folder in ("est_cli", "conf"):
        for path in (root / folder).rglob("*.*"):
            if path.suffix in {".py", ".yaml"}:
                assert not re.search(r"\b[0-9a-f]{40}\b|\bhf_[A-Za-z0-9]{20,}", path.read_text()), path
