"""Shards: parts of the splits that several processes tokenize, each kept from the moment that it is complete."""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from est_cli.data.corpora import Corpus
from est_cli.data.splits import Split
from est_cli.data.token_files import Counts, write_tokens
from est_cli.data.tokenizers import Tokenizer, load_tokenizer
from est_cli.errors import UserError


@dataclass(frozen=True)
class Shard:
    """A part of a source's split, and the file that gets its tokens."""

    source: int
    split: Split
    file: Path

    def find(self, item_bytes: int) -> Counts | None:
        """What the shard came to, where its file is complete."""
        try:
            counts = Counts(**json.loads(self._record.read_text("utf-8")))
            return counts if self.file.stat().st_size == counts.tokens * item_bytes else None
        except (OSError, ValueError, TypeError):
            return None

    def write(self, tokenizer: Tokenizer, threads: int | None, advance: Callable[[int], None]) -> None:
        """Raises OSError where the file cannot be written."""
        partial = self.file.with_suffix(f".{os.getpid()}")
        counts = write_tokens(self.split, tokenizer, partial, threads, advance)
        os.replace(partial, self.file)
        partial.write_text(json.dumps(dataclasses.asdict(counts)), "utf-8")
        os.replace(partial, self._record)

    @property
    def _record(self) -> Path:
        return self.file.with_suffix(".json")


@dataclass(frozen=True)
class Workers:
    """Processes that tokenize."""

    count: int
    threads: int | None
    """Of each process; None takes every core."""


def choose_workers(num_workers: int | str, n_shards: int, n_bytes: int, shard_bytes: int) -> Workers:
    """`auto` starts no processes for text that one has done before others have begun."""
    if num_workers != "auto":
        return Workers(max(1, min(num_workers, n_shards)), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(cores, n_shards, n_bytes // shard_bytes))
    return Workers(count, None if count == 1 else 1)


def tokenize_shards(
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    folder: Path,
    corpora: Sequence[Corpus],
    workers: Workers,
    advance: Callable[[int], None],
) -> None:
    """Writes the shards; `folder` holds what `tokenizer.save` wrote, `corpora` belong to the sources.

    Raises UserError where a process was killed.
    """
    if workers.count == 1:
        for shard in shards:
            shard.write(tokenizer, workers.threads, advance)
        return
    # Fork would copy locks that threads of torch, arrow or the tokenizers hold.
    context = multiprocessing.get_context("spawn")
    arguments = (tokenizer.kind, folder, corpora)
    with ProcessPoolExecutor(workers.count, context, _start_worker, arguments) as pool:
        try:
            for done in as_completed([pool.submit(_write_in_worker, _without_corpus(shard)) for shard in shards]):
                advance(done.result())
        except BrokenProcessPool:
            raise UserError(
                f"data.num_workers={workers.count}: a process that tokenized was killed, most likely for "
                "want of memory; start again with fewer, and what is done is used"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _without_corpus(shard: Shard) -> Shard:
    """A corpus may be large, and travels once a process."""
    return dataclasses.replace(shard, split=dataclasses.replace(shard.split, corpus=None))


_worker: tuple[Tokenizer, Sequence[Corpus]]
"""What a process of the pool works with."""


def _start_worker(kind: str, folder: Path, corpora: Sequence[Corpus]) -> None:
    global _worker
    # An interrupt from the keyboard reaches every process; the one that started them decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = load_tokenizer(kind, folder), corpora


def _end_with_parent() -> None:
    """Pools do not notice when the process that started them was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_in_worker(shard: Shard) -> int:
    tokenizer, corpora = _worker
    whole = dataclasses.replace(shard, split=dataclasses.replace(shard.split, corpus=corpora[shard.source]))
    whole.write(tokenizer, 1, lambda _: None)
    return whole.split.n_bytes
