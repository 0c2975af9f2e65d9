"""Token files: made once, cached by what decides their content, memory-mapped by whoever trains.

A store is a folder `<kind>-<fingerprint>` in the cache with `train.bin` and `val.bin` (raw little-endian ids, each
document ended by the eot token), the tokenizer's own file and `manifest.json`. It appears by a rename when complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import filelock
import numpy as np
import platformdirs

from est_cli.config import DataConfig, TokenizerConfig
from est_cli.data import Say
from est_cli.data.corpora import Corpus, open_corpus
from est_cli.data.sentencepiece_bpe import SentencePieceTraining
from est_cli.data.splits import split_corpus
from est_cli.data.token_files import TokenizingProgress, token_dtype, write_tokens
from est_cli.data.tokenizers import Tokenizer, choose_tokenizer, load_tokenizer
from est_cli.errors import UserError

# Raise it when the same text would no longer give the same token files.
_FORMAT = 1
_SPLITS = ("train", "val")
_MANIFEST = "manifest.json"


class TokenStore:
    """A prepared corpus."""

    def __init__(self, folder: Path):
        """Raises UserError where `folder` holds no complete store."""
        manifest = _read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: holds no prepared corpus, or one that was cut short")
        self.folder = folder
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]

    @cached_property
    def train(self) -> np.ndarray:
        """Tokens of the training split, memory-mapped [n] uint16 or uint32."""
        return self._map("train")

    @cached_property
    def val(self) -> np.ndarray:
        """Tokens of the validation split, memory-mapped [n] uint16 or uint32."""
        return self._map("val")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.manifest["tokenizer"], self.folder)

    def check(self, seq_len: int, sequences_per_step: int) -> None:
        """Raises UserError where a step would repeat a training sequence, or validation has not a single one."""
        train_tokens, val_tokens = (self.manifest["splits"][split]["tokens"] for split in _SPLITS)
        problems = []
        if (train_tokens - 1) // seq_len < sequences_per_step:
            fitting = (train_tokens - 1) // sequences_per_step
            problems.append(f"data.seq_len={seq_len}: a step of {sequences_per_step} sequences (trainer.batch_size, "
                            f"grad_accum, devices) needs {seq_len * sequences_per_step + 1} training tokens, and the "
                            f"text has {train_tokens}; use more text, fewer sequences, or data.seq_len of at most "
                            f"{max(1, fitting)}")
        if val_tokens - 1 < seq_len:
            problems.append(f"data.seq_len={seq_len}: validation needs {seq_len + 1} tokens, and has {val_tokens}; "
                            "use more text, a larger data.val_fraction, or a smaller data.seq_len")
        if problems:
            raise UserError(*problems)

    def _map(self, split: str) -> np.ndarray:
        return np.memmap(self.folder / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")


def prepare(data: DataConfig, tokenizer: TokenizerConfig, model_vocab_size: int, say: Say,
            show_progress: bool) -> TokenStore:
    """The token files of `data` under `tokenizer`: from the cache, or made now. Safe in several processes at once.

    Raises UserError for text, tokenizers and caches that cannot be used.
    """
    chosen = choose_tokenizer(tokenizer, model_vocab_size)
    corpus = open_corpus(data, say)
    fingerprint = _fingerprint(corpus, data, chosen.definition)
    cache = cache_folder(data)
    folder = cache / f"{data.kind}-{fingerprint[:16]}"
    if _read_manifest(folder) is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(folder, say):
                # Another process may have been faster.
                if _read_manifest(folder) is None:
                    _build(folder, fingerprint, corpus, data, chosen, say, show_progress)
        except OSError as error:
            raise UserError(f"data.cache_dir={cache}: cannot be written ({error.strerror or error}); "
                            "must be a folder with room that you may write to") from None
    store = TokenStore(folder)
    splits = store.manifest["splits"]
    say(f"data: {splits['train']['tokens']:,} training and {splits['val']['tokens']:,} validation tokens, "
        f"vocabulary of {store.manifest['vocab_size']:,}, in {folder}")
    return store


def cache_folder(data: DataConfig) -> Path:
    """Where token files are kept."""
    if data.cache_dir is None:
        return platformdirs.user_cache_path("est-cli", appauthor=False)
    return Path(os.path.abspath(os.path.expanduser(data.cache_dir)))


def _fingerprint(corpus: Corpus, data: DataConfig, tokenizer_definition: dict) -> str:
    decisive = [_FORMAT, corpus.fingerprint, data.val_fraction, tokenizer_definition]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path, say: Say) -> Iterator[None]:
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say("data: another process prepares this text; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, fingerprint: str, corpus: Corpus, data: DataConfig,
           chosen: Tokenizer | SentencePieceTraining, say: Say, show_progress: bool) -> None:
    """Writes the store beside `folder` and renames it. The caller holds the lock."""
    if folder.exists():
        say(f"data: the token files in {folder} were cut short; making them again")
        shutil.rmtree(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        manifest = _write_files(partial, corpus, data.val_fraction, chosen, say, show_progress)
        manifest = {"format": _FORMAT, "fingerprint": fingerprint, **manifest}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _fsync(folder.parent)


def _write_files(folder: Path, corpus: Corpus, val_fraction: float, chosen: Tokenizer | SentencePieceTraining,
                 say: Say, show_progress: bool) -> dict:
    """Writes token files and the tokenizer into `folder`; returns what the manifest says of them."""
    splits = dict(zip(_SPLITS, split_corpus(corpus, val_fraction), strict=True))
    tokenizer = chosen.train(splits["train"], say) if isinstance(chosen, SentencePieceTraining) else chosen
    megabytes = sum(split.n_bytes for split in splits.values()) / 1e6
    n_documents = np.count_nonzero(corpus.sizes)
    say(f"data: tokenizing {n_documents:,} {'document' if n_documents == 1 else 'documents'}, {megabytes:.1f} MB")
    with TokenizingProgress(int(megabytes * 1e6), show_progress) as progress:
        counts = {name: write_tokens(split, name, tokenizer, folder / f"{name}.bin", progress)
                  for name, split in splits.items()}
    say(f"data: tokenized in {progress.seconds:.1f} s ({megabytes / max(progress.seconds, 1e-9):.1f} MB/s)")
    if replaced := sum(count.replaced for count in counts.values()):
        say(f"data: replaced {replaced} invalid UTF-8 sequences by U+FFFD")
    tokenizer.save(folder)
    return {
        "source": corpus.source, "val_fraction": val_fraction,
        "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "splits": {name: dataclasses.asdict(count) for name, count in counts.items()},
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }


def _read_manifest(folder: Path) -> dict | None:
    """The manifest of a store whose files are as long as it says, or None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        complete = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest if complete and manifest["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
