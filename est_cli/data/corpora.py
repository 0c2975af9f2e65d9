"""Where documents come from: the standard library, installed packages, or text files.

A corpus is a sequence of documents, read as UTF-8 bytes. Datasets are in `hf_corpus`.
"""

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
from typing import Protocol, TypeVar

import numpy as np

from est_cli.data import Say, disk
from est_cli.errors import UserError

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
_FOLDERS_LEFT_OUT = re.compile(r"_*(tests?|pycache|vendor(ed)?|third_?party|extern(als)?|generated)_*")
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


T = TypeVar("T")


class Corpus(Protocol):
    source: dict
    """What the manifest says about the origin."""
    fingerprint: str
    """SHA-256 of the content; does not depend on the path."""
    sizes: np.ndarray
    """int64, bytes of each document."""
    keys: np.ndarray
    """uint64 hash of each document's content: equal documents have equal keys."""
    given_val: np.ndarray | None = None
    """bool, the documents of the source's own validation split; None if it has none."""
    groups: np.ndarray | None = None
    """uint64, equal for documents that must be on the same side of the split; None if only equal documents must."""
    packages: np.ndarray | None = None
    """str, the package of each document; None if there are no packages."""

    def read(self, document: int, start: int, end: int) -> bytes:
        """Bytes range(start, end) of a document."""


@dataclass(frozen=True)
class Source:
    """A corpus and its share of the tokens; the shares of all sources add up to 1."""

    corpus: Corpus
    weight: float


class FileCorpus(Corpus):
    """Every file is a document."""

    def __init__(self, files: Sequence[Path], source: dict, digests: Sequence[bytes] | None = None):
        """`digests` are the files' SHA-256 hashes, if the caller knows them."""
        self.files = files
        self.source = source
        self.sizes = np.array([file.stat().st_size for file in files], dtype=np.int64)
        digests = disk.hash_files(files) if digests is None else digests
        self.fingerprint = hashlib.sha256(b"".join(digests)).hexdigest()
        self.keys = _keys(digests)

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


def _keys(digests: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digest[:8] for digest in digests), dtype="<u8")


def text_key(text: bytes) -> bytes:
    """A hash of 8 bytes; documents with equal keys count as equal."""
    return hashlib.blake2b(text, digest_size=8).digest()


class PackageCorpus(FileCorpus):
    """The Python source of installed packages, without copies; each package is on one side of the split.

    Files are sorted by digest, so that every stretch of tokens comes from many packages. The first
    `trainer.eval_tokens` of validation are therefore a fair sample of it.
    """

    def __init__(self, say: Say):
        roots = site_packages()
        found = find_package_files(roots)
        left_out: Counter[str] = Counter()
        first: dict[bytes, str] = {}
        with ThreadPoolExecutor() as pool:
            for place, digest in zip(found, pool.map(_digest_source, found.values()), strict=True):
                if isinstance(digest, str):
                    left_out[digest] += 1
                elif first.setdefault(digest, place) != place:
                    left_out["exact copies"] += 1
        if not first:
            raise UserError(
                f"data=packages: there is no Python source in {', '.join(map(str, roots))}; install packages there, "
                "or use data=stdlib"
            )
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
        return _keys(hashlib.sha256(name.encode()).digest() for name in names)


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
    places = _python_files(root, lambda folder: not _STDLIB_FOLDERS_LEFT_OUT.fullmatch(folder))
    # A distribution's additions (sitecustomize) are links; build settings name its machines.
    files = [
        root / place
        for place in places
        if not (root / place).is_symlink() and not _STDLIB_FILES_LEFT_OUT.fullmatch(place.as_posix())
    ]
    if not files:
        raise UserError(
            f"data=stdlib: there is no Python source in {root}; use data=text data.path=FOLDER with text of your own"
        )
    return files, {"kind": "stdlib", "python": platform.python_version()}


def site_packages() -> list[Path]:
    """The folders that hold the running interpreter's packages."""
    paths = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return [Path(path) for path in dict.fromkeys(map(os.path.realpath, paths))]


def find_package_files(roots: Iterable[Path]) -> dict[str, Path]:
    """The Python source of packages in `roots`, keyed by relative path (`numpy/ma/core.py`), sorted."""
    files: dict[str, Path] = {}
    for root in roots:
        for place in _python_files(root, lambda name: name.isidentifier() and not _FOLDERS_LEFT_OUT.fullmatch(name)):
            if not _PACKAGES_LEFT_OUT.fullmatch(place.parts[0].removesuffix(".py")):
                files.setdefault(place.as_posix(), root / place)
    return dict(sorted(files.items()))


def _python_files(root: Path, visits: Callable[[str], bool]) -> Iterator[Path]:
    """Python files below `root`, relative to it, sorted within their folder. `visits` chooses folders by name."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(filter(visits, folders))
        yield from (Path(folder, name).relative_to(root) for name in sorted(names) if name.endswith(".py"))


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
    is always read.
    """
    skipped: disk.Skipped = defaultdict(list)
    files: dict[str, Path] = {}
    for entry in disk.path_entries(paths):
        path = os.path.expanduser(entry)
        found = [Path(path)]
        if not os.path.isfile(path):
            several = disk.walk(path) if os.path.isdir(path) else disk.matching(path)
            if not several:
                raise disk.no_such_path(entry)
            found = [file for file in several if disk.is_readable(file, _looks_like_text, "binary", skipped)]
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    filled = [file for file in files.values() if file.stat().st_size]
    if empty := [file for file in files.values() if not file.stat().st_size]:
        skipped["empty"] = empty
    disk.tell_skipped(skipped, say)
    if not filled:
        raise UserError(f"data.path={disk.show_paths(paths)}: holds no text")
    return filled


def _looks_like_text(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(_LOOKED_AT_BYTES)
    strange = len(start) - len(start.translate(None, _STRANGE_BYTES))
    strange += start.decode("utf-8", "replace").count("\ufffd")
    return strange <= _STRANGE_SHARE * len(start)


def grouped(items: Iterable[T], n_bytes: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Consecutive items in lists, each of which ends with the item that reaches `most` bytes."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += n_bytes(item)
        if size >= most:
            yield group
            group, size = [], 0
    if group:
        yield group
