"""What a prepared corpus holds."""

import numpy as np

from est_cli.data.tokens import TokenStore

_CHUNK_TOKENS = 1 << 24


def inspect(store: TokenStore, n_samples: int = 3, sample_tokens: int = 64) -> dict:
    """Counts of each split, the entropy of its unigrams, bytes per token, and decoded samples of the training split.

    `mixture` has an entry for each of several sources: its weight, the share of the tokens that it got, how often it
    was used (`passes`). `packages` has the bytes of each package in each split, where there are packages. `tokenizing`
    is how fast the store was made.
    The unigram entropy is the loss of a model that knows how frequent each token is and nothing else.
    """
    manifest = store.manifest
    return {
        "folder": str(store.folder),
        "fingerprint": store.fingerprint,
        "source": manifest["source"],
        "tokenizer": {"kind": manifest["tokenizer"], "vocab_size": manifest["vocab_size"], "eot": manifest["eot"]},
        "dtype": np.dtype(manifest["dtype"]).name,
        "splits": {name: _describe(store, name) for name in manifest["splits"]},
        "mixture": manifest["mixture"],
        "packages": manifest.get("packages", {}),
        "tokenizing": manifest["tokenizing"],
        "samples": _samples(store, n_samples, sample_tokens),
    }


def unigram_entropy(tokens: np.ndarray, vocab_size: int) -> float:
    """Entropy of the token frequencies, in nats."""
    counts = count_tokens(tokens, vocab_size)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, int64 [vocab_size]; reads a memory-mapped file piece by piece."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + _CHUNK_TOKENS], minlength=vocab_size)
    return counts


def _describe(store: TokenStore, name: str) -> dict:
    counts = store.manifest["splits"][name]
    nats = unigram_entropy(getattr(store, name), store.manifest["vocab_size"])
    return {
        **counts,
        "bytes_per_token": counts["bytes"] / counts["tokens"],
        "unigram_entropy_nats": nats,
        "unigram_entropy_bits": nats / np.log(2).item(),
    }


def _samples(store: TokenStore, n_samples: int, sample_tokens: int) -> list[str]:
    last = max(0, len(store.train) - sample_tokens)
    starts = np.linspace(0, last, n_samples).astype(int)
    return [store.tokenizer.decode(store.train[start : start + sample_tokens].tolist()) for start in starts]
