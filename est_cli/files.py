"""Files that a kill or a power loss leaves whole, and JSON files."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path that is synced and renamed to `file` at the end, so that `file` is always complete."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield partial
        sync(partial)  # a rename can reach the disk before the contents
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Neither synced nor renamed; see `replacing`."""
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; an empty dict if there is no such file, or it holds something else."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
