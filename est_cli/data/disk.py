"""Local files: the cache, the files that `data.path` names, which are skipped and why, hashes."""

import contextlib
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.errors import UserError, nearest

Skipped = dict[str, list[Path]]
"""Files that are not read, by reason."""
FORMATS = "parquet, jsonl, json, csv, tsv, txt or arrow"
"""What data=hf reads."""


def cache_folder(data: DataConfig) -> Path:
    """Where token files and rows are kept."""
    if data.cache_dir is None:
        return platformdirs.user_cache_path("est-cli", appauthor=False)
    return Path(os.path.abspath(os.path.expanduser(data.cache_dir)))


@contextlib.contextmanager
def writable_cache(data: DataConfig) -> Iterator[Path]:
    """The cache's folder, made if it is missing. Raises UserError if it cannot be written."""
    folder = cache_folder(data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise UserError(
            f"data.cache_dir={folder}: cannot be written ({error.strerror or error}); "
            "must be a folder with room that you may write to"
        ) from None


def path_entries(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """`data.path` as a tuple; raises UserError if it is empty."""
    if not paths:
        raise UserError("data.path: is missing; must be a file, a folder, a glob, or a list of these")
    return (paths,) if isinstance(paths, str) else tuple(paths)


def show_paths(paths: str | tuple[str, ...]) -> str:
    return paths if isinstance(paths, str) else paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"


def no_such_path(entry: str) -> UserError:
    """The error for a path that does not exist, with the nearest name that does."""
    if glob.has_magic(entry):
        return UserError(f"data.path={entry}: no file matches")
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(entry)))
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    names = os.listdir(folder) if os.access(folder, os.R_OK) else []
    return UserError(
        f"data.path={entry}: must be a file, a folder or a glob; there is no '{name}' in {folder}{nearest(name, names)}"
    )


def walk(root: str) -> Iterator[Path]:
    """Files below `root`, sorted, without hidden ones. Follows links, and visits no folder twice."""
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        visited.add(real)


def matching(pattern: str) -> list[Path]:
    """Files that match a glob, sorted."""
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(match)]


def is_readable(file: Path, fits: Callable[[Path], object], misfit: str, skipped: Skipped) -> bool:
    """Whether a file can be read and `fits` accepts it; otherwise it goes into `skipped`."""
    if not file.exists():
        reason = "dead links" if file.is_symlink() else "missing"
    elif not file.is_file():
        reason = "special files"
    elif not os.access(file, os.R_OK):
        reason = "unreadable"
    elif not fits(file):
        reason = misfit
    else:
        return True
    skipped[reason].append(file)
    return False


def tell_skipped(skipped: Skipped, say: Say) -> None:
    for reason, files in skipped.items():
        say(f"data.path: skipped {count_files(files)} ({reason}), such as {show_file(files[0])}")


def count_files(files: Sequence) -> str:
    return f"{len(files):,} file{'s' if len(files) > 1 else ''}"


def show_file(file: Path) -> str:
    """A path that can be printed, also if its name is not valid UTF-8."""
    return os.fsencode(file).decode("utf-8", "replace")


def hash_files(files: Sequence[Path]) -> list[bytes]:
    """SHA-256 of each file, on all cores: hashing releases the GIL."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_hash_file, files))


def _hash_file(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise UserError(f"data.path: cannot read {file} ({error.strerror})") from None
