"""Corpora that fit in a line."""

import hashlib

import numpy as np

WORDS = [
    "def",
    "return",
    "self",
    "the",
    "value",
    "of",
    "a",
    "list",
    "is",
    "not",
    "None",
    "and",
    "in",
    "for",
    "while",
    "class",
    "import",
    "raise",
    "error",
]


def prose(n_lines: int, seed: int = 0) -> str:
    """Text that repeats words, not lines."""
    return "".join(
        " ".join(WORDS[(seed + i * (j + 3) + j * j) % len(WORDS)] for j in range(9)) + f" {seed} {i}\n"
        for i in range(n_lines)
    )


class Documents:
    """A corpus in memory."""

    def __init__(self, *documents: bytes, given_val=None, groups=None):
        self.documents = documents
        self.source = {"kind": "text"}
        self.sizes = np.array([len(document) for document in documents], dtype=np.int64)
        digests = [hashlib.blake2b(document, digest_size=8).digest() for document in documents]
        self.keys = np.frombuffer(b"".join(digests), dtype=np.uint64)
        self.given_val = given_val
        self.groups = groups
        self.packages = None

    def read(self, document, start, end):
        assert 0 <= start <= end <= self.sizes[document]
        return self.documents[document][start:end]
