"""environment.json: where a run's numbers come from. Environment variables, which hold secrets, are not recorded."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from est_cli.files import read_json, replacing, write_json
from est_cli.runs.cooldown import Trunk
from est_cli.training.device import cpu_name

PACKAGES = (
    "est-cli", "torch", "triton", "numpy", "hydra-core", "omegaconf", "safetensors", "sentencepiece", "tokenizers",
    "datasets", "transformers", "wandb",
)  # fmt: skip
"""What can change a run's numbers or files."""


def write_environment(path: Path, overrides: list[str], trunk: Trunk | None = None) -> None:
    """Record this start of a run: code, packages, machine and command line of this process.

    A run that continues keeps the records of its earlier starts, oldest first.
    """
    record: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "overrides": overrides,
        "directory": os.getcwd(),
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "machine": machine(),
    }
    if trunk is not None:
        begins = {"checkpoint": str(trunk.folder), "step": trunk.step, "run_id": trunk.config.run_id}
        record["cooldown_of"] = begins
    if before := read_json(path):
        record["earlier_starts"] = [*before.pop("earlier_starts", []), before]
    with replacing(path) as partial:
        write_json(partial, record)


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that `folder` is tracked in, and whether tracked files differ; None outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()  # fmt: skip

    try:
        # An installed package may lie below somebody else's checkout, as a virtual environment does.
        git("ls-files", "--error-unmatch", ".")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
