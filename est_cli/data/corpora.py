"""Where text comes from: a corpus is a sequence of documents, read as UTF-8 bytes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.text_files import find_stdlib_files, find_text_files, hash_files
from est_cli.errors import UserError


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

    def read(self, document: int, start: int, end: int) -> bytes:
        """Bytes range(start, end) of a document."""


class FileCorpus:
    """Every file is a document."""

    given_val = None

    def __init__(self, files: Sequence[Path], source: dict):
        self.files = files
        self.source = source
        self.sizes = np.array([file.stat().st_size for file in files], dtype=np.int64)
        digests = hash_files(files)
        self.fingerprint = hashlib.sha256(b"".join(digests)).hexdigest()
        self.keys = np.array([int.from_bytes(digest[:8], "little") for digest in digests], dtype=np.uint64)

    def read(self, document: int, start: int, end: int) -> bytes:
        file = self.files[document]
        try:
            with file.open("rb") as stream:
                stream.seek(start)
                data = stream.read(end - start)
        except OSError as error:
            raise UserError(f"data.path: cannot read {file} ({error.strerror})") from None
        if len(data) < end - start:
            raise UserError(f"data.path: {file} became shorter while it was read")
        return data


def open_corpus(data: DataConfig, say: Say) -> Corpus:
    """The documents that `data` names.

    Raises UserError where there is nothing to read.
    """
    if data.kind == "stdlib":
        files, source = find_stdlib_files()
        return FileCorpus(files, source)
    if data.kind == "hf":
        from est_cli.data.hf_corpus import HFCorpus
        from est_cli.data.text_streams import StreamedCorpus

        return StreamedCorpus(data) if data.streaming else HFCorpus(data)
    return FileCorpus(find_text_files(data.path, say), {"kind": "text", "path": data.path})
