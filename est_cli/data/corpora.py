"""Where documents come from: the standard library, installed packages, or text files.

A corpus is a sequence of documents, read as UTF-8 bytes. Datasets are in `hf_corpus`.
"""

import contextlib
import glob
import hashlib
import os
import platform
import re
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import platformdirs

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.errors import UserError, nearest

# Tests repeat themselves, tables are not prose, and the rest does not belong to the standard library.
_STDLIB_FOLDERS_LEFT_OUT = re.compile(
    r"tests?|idle_test|(site|dist)-packages|__pycache__|encodings|pydoc_data|_bundled|config-.*"
)
_STDLIB_FILES_LEFT_OUT = re.compile(r"(.*/)?_sysconfigdata.*|html/entities\.py|_opcode_metadata\.py|stringprep\.py")

# This project's own source changes while people work on it; the others come with the tool that made the environment.
# Editable installs leave modules that only name the path of a checkout.
_PACKAGES_LEFT_OUT = re.compile(
    r"est_cli|pip|setuptools|wheel|_distutils_hack|pkg_resources|_virtualenv|(__editable__|_editable_impl_).*"
)
# Tests repeat themselves, vendored packages may also be on the other side of the split, and generated code repeats its
# template.
_PACKAGE_FOLDERS_LEFT_OUT = re.compile(r"_*(tests?|pycache|vendor(ed)?|third_?party|extern(als)?|generated)_*")
_GENERATED = re.compile(
    rb"^#.*(do not edit|@generated|auto-?generated|automatically generated|generated (by|from))", re.I | re.M
)
_HEADER_BYTES = 1000
"""Generated files say so at the top."""

_STRANGE_SHARE = 0.3
"""A file is binary if more of its first bytes are control characters or invalid UTF-8 (Perl's -T)."""
_STRANGE_BYTES = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b")) + b"\x7f"
_LOOKED_AT_BYTES = 8192

_COMPARED_LINE_BYTES = 40
_SHARED_LINES = 0.1
"""Packages that share more of their long lines than this count as one: `httpx` and its fork share 0.6 of them, `typer`
and the `click` inside it 0.3, packages that do not copy each other less than 0.06."""
_FEWEST_SHARED_LINES = 8
"""In a package with few long lines, one common phrase can be a tenth of them."""


class Corpus(Protocol):
    source: dict
    """What the manifest says about the origin."""
    fingerprint: str
    """SHA-256 of the content; does not depend on the path."""
    sizes: np.ndarray
    """int64, bytes of each document."""
    keys: np.ndarray
    """uint64 hash of each document's content: equal documents have equal keys."""
    given_val: np.ndarray | None
    """bool, the documents of the source's own validation split; None if it has none."""
    groups: np.ndarray | None
    """uint64, equal for documents that must be on the same side of the split; None if only equal documents must."""
    packages: np.ndarray | None
    """str, the package of each document; None if there are no packages."""

    def read(self, document: int, start: int, end: int) -> bytes:
        """Bytes range(start, end) of a document."""


@dataclass(frozen=True)
class Source:
    """A corpus and its share of the tokens; the shares of all sources add up to 1."""

    corpus: Corpus
    weight: float


class FileCorpus:
    """Every file is a document."""

    given_val = None
    groups: np.ndarray | None = None
    packages: np.ndarray | None = None

    def __init__(self, files: Sequence[Path], source: dict, digests: Sequence[bytes] | None = None):
        """`digests` are the files' SHA-256 hashes, if the caller knows them."""
        self.files = files
        self.source = source
        self.sizes = np.array([file.stat().st_size for file in files], dtype=np.int64)
        digests = hash_files(files) if digests is None else digests
        self.fingerprint = hashlib.sha256(b"".join(digests)).hexdigest()
        self.keys = np.array([int.from_bytes(digest[:8], "little") for digest in digests], dtype=np.uint64)

    def read(self, document: int, start: int, end: int) -> bytes:
        file = self.files[document]
        key = "data.path" if self.source["kind"] == "text" else f"data={self.source['kind']}"
        try:
            with file.open("rb") as stream:
                stream.seek(start)
                data = stream.read(end - start)
        except OSError as error:
            raise UserError(f"{key}: cannot read {file} ({error.strerror})") from None
        if len(data) < end - start:
            raise UserError(f"{key}: {file} became shorter while it was read")
        return data


class PackageCorpus(FileCorpus):
    """The Python source of installed packages, without copies; each package is on one side of the split.

    Files are sorted by digest, so that every stretch of tokens comes from many packages. The first
    `trainer.eval_tokens` of validation are therefore a fair sample of it.
    """

    def __init__(self, say: Say):
        found = find_package_files()
        left_out: Counter[str] = Counter()
        first: dict[bytes, str] = {}
        with ThreadPoolExecutor() as pool:
            for place, digest in zip(found, pool.map(_digest_source, found.values()), strict=True):
                reason = digest if isinstance(digest, str) else "exact copies" if digest in first else None
                if reason is None:
                    first[digest] = place
                else:
                    left_out[reason] += 1
        if not first:
            raise UserError("data=packages: the installed packages hold no text; use data=stdlib")
        places = [first[digest] for digest in sorted(first)]
        self.packages = np.array([place.split("/")[0].removesuffix(".py") for place in places])
        n_packages = len(np.unique(self.packages))
        source = {
            "kind": "packages",
            "python": platform.python_version(),
            "packages": n_packages,
            "left_out": dict(sorted(left_out.items())),
        }
        super().__init__([found[place] for place in places], source, sorted(first))
        # The split depends on the packages' names.
        names = "\n".join(self.packages)
        self.fingerprint = hashlib.sha256(f"{self.fingerprint}\n{names}".encode()).hexdigest()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
        say(
            f"data: {len(places):,} files of {n_packages:,} packages, {self.sizes.sum() / 1e6:.1f} MB"
            + (f"; left out: {reasons}" if reasons else "")
        )

    @cached_property
    def groups(self) -> np.ndarray:
        """A hash of the package's name, or of the first name among packages that share text."""
        first_names = join_near_copies(zip(self.packages.tolist(), self.files, strict=True))
        names = (first_names[package] for package in self.packages.tolist())
        digests = (hashlib.sha256(name.encode()).digest()[:8] for name in names)
        return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def join_near_copies(files: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """Maps each package to the first name among those that share text with it, directly or through others.

    Otherwise forks and renamed copies would be on both sides of the split. Compares the files' long lines; of these
    it samples an eighth, those whose hash is 0 modulo 8.
    """
    owners: dict[int, set[str]] = {}
    n_lines: Counter[str] = Counter()
    for package, file in files:
        n_lines[package] += 0
        for line in set(file.read_bytes().split(b"\n")):
            if len(line) >= _COMPARED_LINE_BYTES and not line.startswith((b"#", b"from ", b"import ")):
                key = zlib.crc32(line)
                if key % 8 == 0 and package not in (known := owners.setdefault(key, set())):
                    known.add(package)
                    n_lines[package] += 1
    shared = Counter((a, b) for known in owners.values() for a in known for b in known if a < b)
    first = {package: package for package in n_lines}
    for (a, b), count in sorted(shared.items()):
        if count >= max(_FEWEST_SHARED_LINES, _SHARED_LINES * min(n_lines[a], n_lines[b])):
            low, high = sorted((first[a], first[b]))
            first = {package: low if name == high else name for package, name in first.items()}
    return first


def find_stdlib_files() -> tuple[list[Path], dict]:
    """The running interpreter's own standard library source, sorted, and a description of it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _STDLIB_FOLDERS_LEFT_OUT.fullmatch(name))
        for file in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            # A distribution's additions (sitecustomize) are links; build settings name its machines.
            if not file.is_symlink() and not _STDLIB_FILES_LEFT_OUT.fullmatch(file.relative_to(root).as_posix()):
                files.append(file)
    if not files:
        raise UserError(
            f"data=stdlib: there is no Python source in {root}; use data=text data.path=FOLDER with text of your own"
        )
    return files, {"kind": "stdlib", "python": platform.python_version()}


def site_packages() -> list[Path]:
    """The folders that hold the running interpreter's packages."""
    paths = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return [Path(path) for path in dict.fromkeys(map(os.path.realpath, paths))]


def find_package_files() -> dict[str, Path]:
    """The Python source of installed packages, keyed by relative path (`numpy/ma/core.py`), sorted."""
    roots = site_packages()
    files: dict[str, Path] = {}
    for root in roots:
        for folder, folders, names in os.walk(root):
            inside = Path(folder).relative_to(root)
            folders[:] = [
                name
                for name in folders
                if name.isidentifier()
                and not _PACKAGE_FOLDERS_LEFT_OUT.fullmatch(name)
                and (inside.parts or not _PACKAGES_LEFT_OUT.fullmatch(name))
            ]
            for name in names:
                if name.endswith(".py") and (
                    inside.parts or not _PACKAGES_LEFT_OUT.fullmatch(name.removesuffix(".py"))
                ):
                    files.setdefault((inside / name).as_posix(), Path(folder, name))
    if not files:
        raise UserError(
            f"data=packages: there is no Python source in {', '.join(map(str, roots))}; install packages there, "
            "or use data=stdlib"
        )
    return dict(sorted(files.items()))


def _digest_source(file: Path) -> bytes | str:
    """SHA-256 of a source file, or why `data=packages` leaves it out."""
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

    In folders and globs, skips hidden files, dead links and binary files, and says so. A file that is named itself
    is read as it is.
    """
    skipped: dict[str, list[Path]] = defaultdict(list)
    files: dict[str, Path] = {}
    for entry in path_entries(paths):
        for file in _expand(entry, skipped):
            files.setdefault(os.path.realpath(file), file)
    filled = [file for file in files.values() if file.stat().st_size]
    skipped["empty"] += [file for file in files.values() if not file.stat().st_size]
    tell_skipped(skipped, say)
    if not filled:
        raise UserError(f"data.path={show_paths(paths)}: holds no text")
    return filled


def _expand(entry: str, skipped: dict[str, list[Path]]) -> Iterator[Path]:
    path = os.path.expanduser(entry)
    if os.path.isfile(path):
        yield Path(path)
    elif os.path.isdir(path):
        yield from readable_files(walk(path), _looks_like_text, "binary", skipped)
    elif glob.has_magic(path) and (matches := sorted(glob.glob(path, recursive=True))):
        files = (Path(match) for match in matches if not os.path.isdir(match))
        yield from readable_files(files, _looks_like_text, "binary", skipped)
    else:
        raise missing(entry)


def _looks_like_text(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(_LOOKED_AT_BYTES)
    strange = len(start) - len(start.translate(None, _STRANGE_BYTES))
    strange += start.decode("utf-8", "replace").count("\ufffd")
    return strange <= _STRANGE_SHARE * len(start)


def path_entries(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """`data.path` as a tuple; raises UserError if it is empty."""
    if not paths:
        raise UserError("data.path: is missing; must be a file, a folder, a glob, or a list of these")
    return (paths,) if isinstance(paths, str) else tuple(paths)


def show_paths(paths: str | tuple[str, ...]) -> str:
    return paths if isinstance(paths, str) else paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"


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
    """Files below `root`, sorted, without hidden ones. Follows links, and visits no folder twice."""
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        visited.add(real)


def readable_files(
    files: Iterable[Path], fits: Callable[[Path], bool], misfit: str, skipped: dict[str, list[Path]]
) -> Iterator[Path]:
    """Those of `files` that can be read and that `fits` accepts; the others go into `skipped` by reason."""
    for file in files:
        if not file.exists():
            skipped["dead links" if file.is_symlink() else "missing"].append(file)
        elif not file.is_file():
            skipped["special files"].append(file)
        elif not os.access(file, os.R_OK):
            skipped["unreadable"].append(file)
        elif not fits(file):
            skipped[misfit].append(file)
        else:
            yield file


def tell_skipped(skipped: dict[str, list[Path]], say: Say) -> None:
    for reason, files in skipped.items():
        if files:
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


def cache_folder(data: DataConfig) -> Path:
    """Where token files and rows are kept."""
    if data.cache_dir is None:
        return platformdirs.user_cache_path("est-cli", appauthor=False)
    return Path(os.path.abspath(os.path.expanduser(data.cache_dir)))


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `file` at the end, so that `file` is always complete."""
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
