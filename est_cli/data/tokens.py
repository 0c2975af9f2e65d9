"""Token stores: made once, kept in a cache under a fingerprint of their content, and memory-mapped for training.

A store is a folder `<kind>-<fingerprint>` in the cache with `train.bin` and `val.bin` (raw little-endian ids, each
document followed by the eot token), the tokenizer's file and `manifest.json`. A rename makes it visible when complete.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from pathlib import Path

import filelock
import numpy as np

from est_cli.config import DataConfig, TokenizerConfig
from est_cli.data import Say, disk
from est_cli.data.corpora import Source
from est_cli.data.preparation import WORK, write_store
from est_cli.data.run_data import RunData, Text
from est_cli.data.splits import open_sources
from est_cli.data.streams import ShardWriter, StreamedTokens, write_streamed_store
from est_cli.data.tokenizers import Tokenizer, choose_tokenizer, load_tokenizer
from est_cli.errors import UserError, collecting
from est_cli.files import read_json, sync, write_json

# Raise it when the same text would no longer give the same token files.
_FORMAT = 3
_MANIFEST = "manifest.json"
_COUNTED_AT_ONCE = 1 << 24


class TokenStore:
    """A prepared corpus."""

    def __init__(
        self, folder: Path, sources: Sequence[Source] = (), train_tokens: int | None = None, text: Text | None = None
    ):
        """`sources` continue a stream; without them a store only has the shards that were written so far.
        `train_tokens` limits the training split to its first tokens. `text` is what the files were made from.

        Raises UserError if `folder` holds no complete store.
        """
        self.manifest = _read_manifest(folder)
        if self.manifest is None:
            raise UserError(f"{folder}: holds no prepared corpus, or one that was cut short")
        self.folder, self.text = folder, text
        self._sources, self._train_tokens = sources, train_tokens
        self.fingerprint: str = self.manifest["fingerprint"]

    @cached_property
    def train(self) -> np.ndarray | StreamedTokens:
        """Tokens of the training split, memory-mapped [n] uint16 or uint32; a stream's object waits for them."""
        if self.is_streamed:
            dtype = np.dtype(self.manifest["dtype"])
            return StreamedTokens(self.folder, dtype, lambda: ShardWriter(self.folder, self._sources, self.tokenizer))
        return self._map("train")[: self._train_tokens]

    @property
    def is_streamed(self) -> bool:
        return self.manifest.get("streaming", False)

    @cached_property
    def val(self) -> np.ndarray:
        """Tokens of the validation split, memory-mapped [n] uint16 or uint32."""
        return self._map("val")

    @cached_property
    def val_bytes(self) -> np.ndarray:
        """float64 [vocab_size]: bytes of validation text in each token.

        If the tokenizer drops or folds text, its tokens hold fewer bytes than were read; each then gets a larger share.
        """
        token_bytes = self.tokenizer.token_bytes
        told = int(token_bytes @ count_tokens(self.val, len(token_bytes)))
        counted = self.manifest["splits"]["val"]["bytes"]
        return token_bytes * (1.0 if told == 0 or self.manifest.get("mixture") else counted / told)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.manifest["tokenizer"], self.folder)

    def check(self, seq_len: int, sequences_per_step: int) -> None:
        """Raises UserError if a step would repeat a training sequence, or validation does not have a single one."""
        val_tokens, problems = self.manifest["splits"]["val"]["tokens"], []
        train_tokens = math.inf if self.is_streamed else len(self.train)
        if (train_tokens - 1) // seq_len < sequences_per_step:
            more = "more text" if self._train_tokens is None else "a larger data.train_tokens"
            fitting = (train_tokens - 1) // sequences_per_step
            problems.append(
                f"data.seq_len={seq_len}: a step of {sequences_per_step} sequences (trainer.batch_size, "
                f"grad_accum, devices) needs {seq_len * sequences_per_step + 1} training tokens, and the "
                f"text has {train_tokens}; use {more}, fewer sequences, or data.seq_len of at most "
                f"{max(1, fitting)}"
            )
        if val_tokens - 1 < seq_len:
            problems.append(
                f"data.seq_len={seq_len}: validation needs {seq_len + 1} tokens, and has {val_tokens}; "
                "use more text, a larger data.val_fraction, or a smaller data.seq_len"
            )
        if problems:
            raise UserError(*problems)

    def _map(self, split: str) -> np.ndarray:
        return np.memmap(self.folder / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")


def open_store(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    model_vocab_size: int,
    say: Say,
    show_progress: bool,
    run: RunData | None = None,
    check: Callable[[Text], None] = lambda text: None,
) -> TokenStore:
    """The token files of `data` under `tokenizer`: from the cache, or made now. Several processes can call it at once.

    A `run` that has begun keeps its own tokenizer; `tokenizer` is then ignored. Calls `check` with the text before
    any file is made.

    Raises UserError for text, tokenizers and caches that cannot be used.
    """
    problems: list[str] = []
    with collecting(problems):
        chosen = (run and run.tokenizer) or choose_tokenizer(tokenizer, model_vocab_size)
    with collecting(problems):
        sources = open_sources(data, say)
    if problems:
        raise UserError(*problems)
    text = Text.of(sources, _fingerprint(sources, data, {}))
    check(text)
    fingerprint = _fingerprint(sources, data, chosen.definition)
    # The folder that the run began with may be named after the training of its tokenizer.
    folder = (run and run.text == text and _folder_of(run, data)) or _folder(data, fingerprint)

    def write(partial: Path) -> dict:
        if data.streaming:
            return write_streamed_store(partial, sources, data, chosen, say)
        return write_store(partial, sources, data, chosen, say, show_progress)

    if _read_manifest(folder) is None:
        with disk.writable_cache(data), _locked(folder, say):
            # Another process may have made it meanwhile.
            if _read_manifest(folder) is None:
                _build(folder, fingerprint, write, say)
    store = TokenStore(folder, sources, data.train_tokens, text)
    training = "streamed" if store.is_streamed else f"{len(store.train):,}"
    say(
        f"data: {training} training and {len(store.val):,} validation tokens, "
        f"vocabulary of {store.manifest['vocab_size']:,}, in {folder}"
    )
    return store


def stored(data: DataConfig, run: RunData) -> TokenStore | None:
    """The token files that the run trained on, if the cache still has them."""
    folder = _folder_of(run, data)
    return folder and TokenStore(folder, (), data.train_tokens, run.text)


def _folder_of(run: RunData, data: DataConfig) -> Path | None:
    """The folder of the run's token files, if it has the run's tokenizer: another library can train other pieces."""
    folder = _folder(data, run.record["store"]) if run.record else None
    manifest = folder and _read_manifest(folder)
    same = manifest and load_tokenizer(manifest["tokenizer"], folder).definition == run.tokenizer.definition
    return folder if same else None


def _folder(data: DataConfig, fingerprint: str) -> Path:
    return disk.cache_folder(data) / f"{data.kind}-{fingerprint[:16]}"


@lru_cache
def current_text(data: DataConfig) -> Text:
    """The text that `data` names now. Raises UserError if there is none."""
    sources = open_sources(data, lambda line: None)
    return Text.of(sources, _fingerprint(sources, data, {}))


def _fingerprint(sources: Sequence[Source], data: DataConfig, tokenizer_definition: dict) -> str:
    content = [[source.corpus.fingerprint, source.weight] for source in sources]
    decisive = [_FORMAT, content, data.val_fraction, tokenizer_definition]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _locked(folder: Path, say: Say) -> AbstractContextManager:
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        say("data: another process prepares this text; waiting for it")
        return lock.acquire()


def _build(folder: Path, fingerprint: str, write: Callable[[Path], dict], say: Say) -> None:
    """Calls `write` with a new folder beside `folder`, adds the manifest and renames it. The caller holds the lock."""
    if folder.exists():
        say(f"data: the token files in {folder} were cut short; making them again")
        shutil.rmtree(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    for unfinished in partial.iterdir():
        if unfinished.is_file():
            unfinished.unlink()
    try:
        manifest = {"format": _FORMAT, "fingerprint": fingerprint, **write(partial)}
        manifest["files"] = {file.name: file.stat().st_size for file in sorted(partial.iterdir()) if file.is_file()}
        write_json(partial / _MANIFEST, manifest)
        for path in (*partial.iterdir(), partial):
            sync(path)
        shutil.rmtree(partial / WORK, ignore_errors=True)
        os.replace(partial, folder)
    except BaseException:
        if any((partial / WORK).glob("*.json")):  # complete shards
            say(f"data: what was tokenized stays in {partial}, and is used when you start again")
        else:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder.parent)


def _read_manifest(folder: Path) -> dict | None:
    """The manifest of a store, or None if its files do not have the sizes that it says."""
    manifest = read_json(folder / _MANIFEST)
    try:
        complete = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest if complete and manifest["format"] == _FORMAT else None
    except (OSError, KeyError, TypeError, AttributeError):
        return None


def inspect(store: TokenStore, n_samples: int = 3, sample_tokens: int = 64) -> dict:
    """Counts of each split, the entropy of its unigrams, bytes per token, and decoded samples of the training split.

    `mixture` has an entry for each of several sources: its weight, its share of the tokens, and how often it was used
    (`passes`). `packages` has the bytes of each package in each split, if there are packages. `tokenizing` is how fast
    the store was made. The unigram entropy is the loss of a model that only knows how frequent each token is.
    """
    manifest = store.manifest
    last = max(0, len(store.train) - sample_tokens)
    starts = np.linspace(0, last, n_samples).astype(int)
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
        "samples": [store.tokenizer.decode(store.train[start : start + sample_tokens].tolist()) for start in starts],
    }


def _describe(store: TokenStore, name: str) -> dict:
    counts = store.manifest["splits"][name]
    nats = unigram_entropy(getattr(store, name), store.manifest["vocab_size"])
    return {
        **counts,
        "bytes_per_token": counts["bytes"] / counts["tokens"],
        "unigram_entropy_nats": nats,
        "unigram_entropy_bits": nats / np.log(2).item(),
    }


def unigram_entropy(tokens: np.ndarray, vocab_size: int) -> float:
    """Entropy of the token frequencies, in nats."""
    counts = count_tokens(tokens, vocab_size)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, int64 [vocab_size]; reads a memory-mapped file piece by piece."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + _COUNTED_AT_ONCE], minlength=vocab_size)
    return counts
