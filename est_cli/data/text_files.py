"""Finds the files of `data=stdlib`, `data=packages` and `data=text`."""

import glob
import hashlib
import os
import platform
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from est_cli.data import Say
from est_cli.errors import UserError, nearest

# Tests repeat themselves, tables are not prose, and the rest is not the standard library's.
_STDLIB_FOLDERS_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "_bundled",
}
_STDLIB_FILES_LEFT_OUT = {"html/entities.py", "_opcode_metadata.py", "stringprep.py"}

# This project's own source changes while one works on it; the rest comes with the tool that made the environment.
_PACKAGES_LEFT_OUT = {"est_cli", "pip", "setuptools", "wheel", "_distutils_hack", "pkg_resources", "_virtualenv"}
# Editable installs leave modules that only name the place of a checkout.
_EDITABLE_PREFIXES = ("__editable__", "_editable_impl_")
# Compared without the underscores around a name. Tests repeat themselves, copies of other packages may sit on the
# other side of the split, and generated code repeats its template.
_PACKAGE_FOLDERS_LEFT_OUT = {
    "test",
    "tests",
    "pycache",
    "vendor",
    "vendored",
    "third_party",
    "thirdparty",
    "extern",
    "externals",
    "generated",
}
_GENERATED = re.compile(
    rb"^#.*(do not edit|@generated|auto-?generated|automatically generated|generated (by|from))", re.I | re.M
)
_HEADER_BYTES = 1000
"""A file that was generated says so at its top."""

_STRANGE_SHARE = 0.3
"""A file whose first bytes hold more control characters and invalid UTF-8 than this is no text (Perl's -T)."""
_TEXT_CONTROLS = b"\t\n\r\f\b\x1b"
_STRANGE_BYTES = bytes(set(range(32)) - set(_TEXT_CONTROLS)) + b"\x7f"
_LOOKED_AT_BYTES = 8192


def find_stdlib_files() -> tuple[list[Path], dict]:
    """The standard library's own source in the running interpreter, sorted, and a description of it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name not in _STDLIB_FOLDERS_LEFT_OUT and not name.startswith("config-")
        )
        for name in sorted(names):
            file = Path(folder, name)
            # A distribution's own additions (sitecustomize) are links, build settings name its machines.
            if (
                name.endswith(".py")
                and not name.startswith("_sysconfigdata")
                and not file.is_symlink()
                and file.relative_to(root).as_posix() not in _STDLIB_FILES_LEFT_OUT
            ):
                files.append(file)
    if not files:
        raise UserError(
            f"data=stdlib: there is no Python source in {root}; use data=text data.path=FOLDER with text of your own"
        )
    return files, {"kind": "stdlib", "python": platform.python_version()}


def site_packages() -> list[Path]:
    """The folders that the running interpreter's packages are installed in."""
    paths = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return [Path(path) for path in dict.fromkeys(map(os.path.realpath, paths))]


def find_package_files() -> dict[str, Path]:
    """The Python source of installed packages, by its place among them (`numpy/ma/core.py`), sorted."""
    roots = site_packages()
    files: dict[str, Path] = {}
    for root in roots:
        for folder, folders, names in os.walk(root):
            inside = Path(folder).relative_to(root)
            folders[:] = [
                name
                for name in folders
                if name.isidentifier()
                and name.strip("_") not in _PACKAGE_FOLDERS_LEFT_OUT
                and (inside.parts or name not in _PACKAGES_LEFT_OUT)
            ]
            for name in names:
                if name.endswith(".py") and (inside.parts or _is_package_module(name.removesuffix(".py"))):
                    files.setdefault((inside / name).as_posix(), Path(folder, name))
    if not files:
        raise UserError(
            f"data=packages: there is no Python source in {', '.join(map(str, roots))}; install packages there, "
            "or use data=stdlib"
        )
    return dict(sorted(files.items()))


def _is_package_module(name: str) -> bool:
    return name not in _PACKAGES_LEFT_OUT and not name.startswith(_EDITABLE_PREFIXES)


def digest_source(file: Path) -> bytes | str:
    """SHA-256 of a source file, or why it is left out of `data=packages`."""
    try:
        data = file.read_bytes()
        data.decode("utf-8")
    except OSError:
        return "unreadable"
    except UnicodeDecodeError:
        return "not UTF-8"
    if not data or b"\0" in data:
        return "empty or binary"
    if _GENERATED.search(data, 0, _HEADER_BYTES):
        return "generated"
    return hashlib.sha256(data).digest()


def find_text_files(paths: str | tuple[str, ...] | None, say: Say) -> list[Path]:
    """The files that `data.path` names (files, folders, globs), in order, each once, without empty ones.

    In folders and globs hidden files, dead links and files that are not text are skipped; a file named by
    itself is taken as it is. What is skipped is told.
    """
    skipped: dict[str, list[Path]] = defaultdict(list)
    files: dict[str, Path] = {}
    for entry in path_entries(paths):
        for file in _expand(entry, skipped):
            files.setdefault(os.path.realpath(file), file)
    filled = [file for file in files.values() if file.stat().st_size]
    skipped["empty file"] += [file for file in files.values() if not file.stat().st_size]
    for reason, group in skipped.items():
        if group:
            first = os.fsencode(group[0]).decode("utf-8", "replace")
            say(f"data.path: skipped {len(group)} {reason}{'s' if len(group) > 1 else ''}, such as {first}")
    if not filled:
        raise UserError(f"data.path={show_paths(paths)}: holds no text")
    return filled


def path_entries(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """`data.path` as a tuple; raises UserError where it is missing."""
    if not paths:
        raise UserError("data.path: is missing; must be a file, a folder, a glob, or a list of these")
    return (paths,) if isinstance(paths, str) else tuple(paths)


def show_paths(paths: str | tuple[str, ...]) -> str:
    return paths if isinstance(paths, str) else paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"


def _expand(entry: str, skipped: dict[str, list[Path]]) -> Iterator[Path]:
    path = os.path.expanduser(entry)
    if os.path.isfile(path):
        yield Path(path)
    elif os.path.isdir(path):
        yield from _only_text(walk(path), skipped)
    elif glob.has_magic(path) and (matches := sorted(glob.glob(path, recursive=True))):
        yield from _only_text((Path(match) for match in matches if not os.path.isdir(match)), skipped)
    else:
        raise missing(entry)


def missing(entry: str) -> UserError:
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
    """Files below `root`, sorted, links followed but no folder visited twice, hidden ones left out."""
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        visited.add(real)


def _only_text(files: Iterator[Path], skipped: dict[str, list[Path]]) -> Iterator[Path]:
    for file in files:
        if not file.exists():
            skipped["dead link"].append(file)
        elif not file.is_file():
            skipped["special file"].append(file)
        elif not os.access(file, os.R_OK):
            skipped["unreadable file"].append(file)
        elif not _looks_like_text(file):
            skipped["binary file"].append(file)
        else:
            yield file


def _looks_like_text(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(_LOOKED_AT_BYTES)
    strange = len(start) - len(start.translate(None, _STRANGE_BYTES))
    strange += start.decode("utf-8", "replace").count("\ufffd")
    return strange <= _STRANGE_SHARE * len(start)


def hash_files(files: Sequence[Path]) -> list[bytes]:
    """SHA-256 of each file, on all cores: hashing lets go of Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_hash_file, files))


def _hash_file(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise UserError(f"data.path: cannot read {file} ({error.strerror})") from None
