"""Windows of token files, and their seeded shuffle.

A window is seq_len + 1 tokens: seq_len inputs, and the seq_len targets shifted by one. Windows start every seq_len
tokens, so every token but the first is a target once. Training sample n is window permutation(epoch)[n % N] with
epoch = n // N: without replacement within an epoch, a pure function of (seed, n).
"""

from typing import Protocol

import numpy as np

_ROUNDS = 8


def n_windows(tokens: np.ndarray, seq_len: int) -> int:
    return max(0, (len(tokens) - 1) // seq_len)


class WindowSource(Protocol):
    """Training tokens that select their windows themselves."""

    def windows(self, seq_len: int, seed: int, first: int, count: int) -> np.ndarray: ...


class Tokens(Protocol):
    """Token ids of a prepared corpus, [n] each."""

    train: np.ndarray | WindowSource
    val: np.ndarray


def training_windows(tokens: np.ndarray | WindowSource, seq_len: int, seed: int, first: int, count: int) -> np.ndarray:
    """The `count` training samples from number `first` on, int64 [count, seq_len + 1]."""
    if not isinstance(tokens, np.ndarray):
        return tokens.windows(seq_len, seed, first, count)
    n = n_windows(tokens, seq_len)
    assert n > 0, "a text shorter than one window is refused by TokenStore.check"
    epochs, indices = np.divmod(first + np.arange(count, dtype=np.int64), n)
    return _gather(tokens, seq_len, permute(indices, n, seed, epochs))


def validation_windows(tokens: np.ndarray, seq_len: int, n_tokens: int) -> np.ndarray:
    """The first windows, with at most `n_tokens` targets but at least one window, int64 [n, seq_len + 1]."""
    n = min(n_windows(tokens, seq_len), max(1, n_tokens // seq_len))
    return _gather(tokens, seq_len, np.arange(n))


def permute(indices: np.ndarray, n: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Position of each index in the permutation of range(n) that belongs to (seed, epoch).

    A balanced Feistel network permutes the next even power of two; cycle walking repeats it until the result is below
    n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Random access, no table.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    key = _mix(_mix(np.full(len(indices), seed, np.uint64)) ^ epochs.astype(np.uint64))
    places = _feistel(indices.astype(np.uint64), half_bits, key)
    while (outside := places >= n).any():
        places[outside] = _feistel(places[outside], half_bits, key[outside])
    return places.astype(np.int64)


def _feistel(places: np.ndarray, half_bits: np.uint64, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = places >> half_bits, places & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(_mix(key ^ np.uint64(number)) ^ right) & mask)
    return left << half_bits | right


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014) on uint64 with wrap-around."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _gather(tokens: np.ndarray, seq_len: int, windows: np.ndarray) -> np.ndarray:
    gathered = np.empty((len(windows), seq_len + 1), dtype=np.int64)
    for row, window in zip(gathered, windows.tolist(), strict=True):
        row[:] = tokens[window * seq_len : window * seq_len + seq_len + 1]
    return gathered
