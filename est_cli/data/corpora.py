"""Where text comes from: a corpus is a sequence of documents, read as UTF-8 bytes."""

import hashlib
import platform
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.text_files import digest_source, find_package_files, find_stdlib_files, find_text_files, hash_files
from est_cli.errors import UserError

_COMPARED_LINE_BYTES = 40
_SHARED_LINES = 0.1
"""Packages that have more of their long lines in common than this count as one: `httpx` and its fork share 0.6 of
them, `typer` and the `click` inside it 0.3, packages that do not copy each other less than 0.06."""
_FEWEST_SHARED_LINES = 8
"""Among a package's few long lines a common phrase is soon a tenth."""


class Corpus(Protocol):
    source: dict
    """What the manifest says about the origin."""
    fingerprint: str
    """SHA-256 of the content, whatever the place it lies at."""
    sizes: np.ndarray
    """int64, bytes of each document."""
    keys: np.ndarray
    """uint64 hash of each document's content: equal documents have equal keys."""
    given_val: np.ndarray | None
    """bool, the documents of the source's own validation split; None where it has none."""
    groups: np.ndarray | None
    """uint64, equal for documents that must land on one side; None where only equal documents must."""
    packages: np.ndarray | None
    """str, the package of each document; None where there are no packages."""

    def read(self, document: int, start: int, end: int) -> bytes:
        """Bytes range(start, end) of a document."""


class FileCorpus:
    """Every file is a document."""

    given_val = None
    groups: np.ndarray | None = None
    packages: np.ndarray | None = None

    def __init__(self, files: Sequence[Path], source: dict, digests: Sequence[bytes] | None = None):
        """`digests` are the SHA-256 of the files, where they are known."""
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
    """The Python source of installed packages, without copies; a package is on one side of the split.

    Files are in the order of their digests, so that every stretch of the tokens is from many packages: the
    `trainer.eval_tokens` that validation begins with are a fair sample of it.
    """

    def __init__(self, say: Say):
        found = find_package_files()
        left_out: Counter[str] = Counter()
        first: dict[bytes, str] = {}
        with ThreadPoolExecutor() as pool:
            digests = pool.map(digest_source, found.values())
            for place, digest in zip(found, digests, strict=True):
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
        # The names decide the split.
        names = "\n".join(self.packages)
        self.fingerprint = hashlib.sha256(f"{self.fingerprint}\n{names}".encode()).hexdigest()
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
        say(
            f"data: {len(places):,} files of {n_packages:,} packages, {self.sizes.sum() / 1e6:.1f} MB"
            + (f"; left out: {reasons}" if reasons else "")
        )

    @cached_property
    def groups(self) -> np.ndarray:
        """A hash of the package's name, or of the first name among packages that have text in common."""
        first_names = join_near_copies(zip(self.packages.tolist(), self.files, strict=True))
        hashes = {
            name: int.from_bytes(hashlib.sha256(first.encode()).digest()[:8], "little")
            for name, first in first_names.items()
        }
        return np.array([hashes[name] for name in self.packages.tolist()], dtype=np.uint64)


def join_near_copies(files: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """For each package, the first name of those that it has text in common with, directly or through others.

    Forks and copies under another name would otherwise sit on both sides. Compared are the long lines of the files,
    an eighth of them: those with a hash of 0 modulo 8.
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


def open_corpus(data: DataConfig, say: Say) -> Corpus:
    """The documents that `data` names.

    Raises UserError where there is nothing to read.
    """
    if data.kind == "stdlib":
        files, source = find_stdlib_files()
        return FileCorpus(files, source)
    if data.kind == "packages":
        return PackageCorpus(say)
    if data.kind == "hf":
        from est_cli.data.hf_corpus import HFCorpus
        from est_cli.data.text_streams import StreamedCorpus

        return StreamedCorpus(data, say) if data.streaming else HFCorpus(data, say)
    return FileCorpus(find_text_files(data.path, say), {"kind": "text", "path": data.path})
