"""Makes the files of a token store: splits, tokenizer, shards, and the token files that the shards are joined to.

Several processes tokenize the shards. The trained tokenizer and every complete shard are kept in a work folder until
the store is complete, so that a killed preparation continues where it was.
"""

import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from est_cli.config import DataConfig
from est_cli.config.auto import n_cores
from est_cli.data import Say
from est_cli.data.corpora import Corpus, Source, grouped
from est_cli.data.splits import Split, split_sources
from est_cli.data.tokenizers import SentencePieceTraining, Tokenizer, load_tokenizer, save_tokenizer
from est_cli.errors import UserError
from est_cli.files import read_json, replacing, write_json

SPLITS = ("train", "val")
SHARD_BYTES = 16 << 20
"""Approximate text of a shard. Another size cuts long documents elsewhere: raise tokens._FORMAT with it."""
_BATCH_BYTES = 4 << 20
_LINE_EVERY_S = 60
WORK = "work"
"""The folder of what is only needed until the store is complete."""


class Counts(NamedTuple):
    """Totals of a split or of a part of it."""

    documents: int = 0
    """Documents that end in it."""
    bytes: int = 0
    """UTF-8 bytes of its text."""
    tokens: int = 0
    replaced: int = 0
    """Invalid UTF-8 sequences that became U+FFFD."""


def _total(counts: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 (little-endian) that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_store(
    folder: Path,
    sources: Sequence[Source],
    data: DataConfig,
    chosen: Tokenizer | SentencePieceTraining,
    say: Say,
    show_progress: bool,
) -> dict:
    """Writes token files and the tokenizer into `folder`; returns their part of the manifest.

    Raises UserError for text that cannot be used, OSError if the folder cannot be written.
    """
    work = folder / WORK
    work.mkdir(exist_ok=True)
    splits = dict(zip(SPLITS, split_sources(sources, data.val_fraction), strict=True))
    tokenizer = _find_or_make_tokenizer(work / "tokenizer", chosen, sources, splits["train"], say)
    tokenizer.threads = None if data.num_workers == "auto" else 1
    tokenizer.save(folder)
    dtype = token_dtype(tokenizer.vocab_size)
    shards = {name: _shards(work, name, own) for name, own in splits.items()}
    speed = _tokenize(shards, tokenizer, work / "tokenizer", sources, data, say, show_progress)
    tokenized: dict[str, list[SourceTokens]] = {name: [] for name in SPLITS}
    for name, own in shards.items():
        for part, source in zip(own, sources, strict=True):
            counts = _total(shard.written() for shard in part)
            tokenized[name].append(SourceTokens([shard.file for shard in part], counts, source.weight))
        interleave(tokenized[name], tokenizer.eot, dtype, folder / f"{name}.bin")
    totals = {name: _total(source.mixed_counts() for source in own) for name, own in tokenized.items()}
    if replaced := sum(total.replaced for total in totals.values()):
        say(f"data: replaced {replaced} invalid UTF-8 sequences by U+FFFD")
    mixture = _describe_mixture(sources, tokenized) if len(sources) > 1 else []
    for source in mixture:
        train = source["splits"]["train"]
        again = f", used {train['passes']:.2f} times" if train["passes"] > 1.005 else ""
        weight = f"(weight {source['weight']:.2%})"
        say(f"data: {train['share']:.2%} {source['path']} {weight}, {train['tokens']:,} tokens{again}")
    origins = [source.corpus.source for source in sources]
    return {
        "source": {"kind": data.kind, "sources": origins} if mixture else origins[0],
        "val_fraction": data.val_fraction,
        **tokenizer_facts(tokenizer),
        "splits": {name: total._asdict() for name, total in totals.items()},
        "mixture": mixture,
        "packages": _package_bytes(splits) if sources[0].corpus.packages is not None else {},
        "tokenizing": speed,
    }


def tokenizer_facts(tokenizer: Tokenizer) -> dict:
    """The manifest's entries about a tokenizer."""
    return {
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "dtype": token_dtype(tokenizer.vocab_size).str,
    }


def _find_or_make_tokenizer(
    folder: Path, chosen: Tokenizer | SentencePieceTraining, sources: Sequence[Source], train: Sequence[Split], say: Say
) -> Tokenizer:
    """The tokenizer in `folder`, from which all processes read it."""
    if not folder.exists():
        if isinstance(chosen, SentencePieceTraining):
            samples = (
                split.sample(int(chosen.train_bytes * source.weight))
                for source, split in zip(sources, train, strict=True)
            )
            chosen = chosen.train([text for sample in samples for text in sample], say)
        save_tokenizer(chosen, folder)
    return load_tokenizer(chosen.definition["kind"], folder)


def _package_bytes(splits: dict[str, list[Split]]) -> dict[str, dict[str, int]]:
    """Bytes of each package in each split, the largest first."""
    sizes = {}
    for name, (split,) in splits.items():
        packages, places = np.unique(split.corpus.packages[split.documents], return_inverse=True)
        n_bytes = np.bincount(places, weights=split.ends - split.starts).astype(int)
        order = np.argsort(-n_bytes, kind="stable")
        sizes[name] = {str(packages[i]): int(n_bytes[i]) for i in order}
    return sizes


@dataclass(frozen=True)
class Shard:
    """A part of a source's split, and the file for its tokens."""

    source: int
    split: Split
    file: Path

    def written(self) -> Counts | None:
        """The counts of the tokens in its file; None if it was not written yet."""
        record = read_json(self._record)
        return Counts(**record) if record and self.file.exists() else None

    def write(self, tokenizer: Tokenizer, advance: Callable[[int], None]) -> None:
        """Writes the tokens; `tokenizer.eot` follows each document that ends. Calls `advance` with bytes of text.

        Raises OSError if the file cannot be written.
        """
        counts, dtype = [], token_dtype(tokenizer.vocab_size)
        with replacing(self.file) as partial, partial.open("wb") as out:
            for batch in grouped(self.split.pieces(), lambda piece: piece.n_bytes, _BATCH_BYTES):
                ids = tokenizer.encode_batch([piece.text for piece in batch], [piece.continued for piece in batch])
                for i, piece in enumerate(batch):
                    if piece.last:
                        ids[i] = np.append(ids[i], tokenizer.eot)
                tokens = np.concatenate(ids).astype(dtype)
                tokens.tofile(out)
                n_bytes, replaced = (sum(getattr(piece, key) for piece in batch) for key in ("n_bytes", "replaced"))
                counts.append(Counts(sum(piece.last for piece in batch), n_bytes, len(tokens), replaced))
                advance(n_bytes)
        with replacing(self._record) as partial:
            write_json(partial, _total(counts)._asdict())

    @property
    def _record(self) -> Path:
        return self.file.with_suffix(".json")

    def with_corpus(self, corpus: Corpus | None) -> "Shard":
        return dataclasses.replace(self, split=dataclasses.replace(self.split, corpus=corpus))


def _shards(work: Path, name: str, splits: Sequence[Split]) -> list[list[Shard]]:
    """The shards of each source's split."""
    return [
        [Shard(i, part, work / f"{name}-{i}-{number:06}.bin") for number, part in enumerate(split.shards(SHARD_BYTES))]
        for i, split in enumerate(splits)
    ]


def _tokenize(
    shards: dict[str, list[list[Shard]]],
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    sources: Sequence[Source],
    data: DataConfig,
    say: Say,
    show_progress: bool,
) -> dict:
    """Writes the missing shards; returns how fast that was."""
    everything = [shard for own in shards.values() for of_source in own for shard in of_source]
    missing = [shard for shard in everything if shard.written() is None]
    total, left = (sum(shard.split.n_bytes for shard in some) for some in (everything, missing))
    workers = choose_workers(data.num_workers, len(missing), left)
    n_documents = sum(shard.split.n_documents for shard in everything)
    say(
        f"data: tokenizing {n_documents:,} {'document' if n_documents == 1 else 'documents'}, {total / 1e6:.1f} MB"
        + (f", with {workers} processes" if workers > 1 else "")
        + (f"; {len(everything) - len(missing)} of {len(everything)} shards were there" if left < total else "")
    )
    with TokenizingProgress(total, total - left, show_progress, say) as progress:
        if workers == 1:
            for shard in missing:
                shard.write(tokenizer, progress.done)
        else:
            corpora = [source.corpus for source in sources]
            _tokenize_in_processes(missing, (tokenizer.kind, tokenizer_folder, corpora), workers, progress.done)
    speed = progress.bytes_per_s / 1e6
    say(f"data: tokenized in {progress.seconds:.1f} s ({speed:.1f} MB/s)")
    return {"seconds": progress.seconds, "mb_per_s": speed, "processes": workers}


def choose_workers(num_workers: int | str, n_shards: int, n_bytes: int) -> int:
    """The number of processes. `auto` starts none for text that one process finishes before others have started."""
    if num_workers == "auto":
        return max(1, min(n_cores(), n_shards, n_bytes // SHARD_BYTES))
    return max(1, min(num_workers, n_shards))


def _tokenize_in_processes(
    shards: Sequence[Shard], start_arguments: tuple, workers: int, advance: Callable[[int], None]
) -> None:
    """Writes the shards. Raises UserError if a process was killed."""
    # Fork would copy locks that threads of torch, arrow or the tokenizers hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, start_arguments) as pool:
        try:
            # The corpus can be large: each process gets it once, and shards travel without it.
            for done in as_completed([pool.submit(_write_in_worker, shard.with_corpus(None)) for shard in shards]):
                advance(done.result())
        except BrokenProcessPool:
            raise UserError(
                f"data.num_workers={workers}: a process that tokenized was killed, most likely because the memory "
                "was full; start again with fewer processes: what is done is kept"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: tuple[Tokenizer, Sequence[Corpus]]
"""What a process of the pool works with."""


def _start_worker(kind: str, folder: Path, corpora: Sequence[Corpus]) -> None:
    global _worker
    # Ctrl-C reaches every process; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(kind, folder)
    tokenizer.threads = 1
    _worker = tokenizer, corpora


def _end_with_parent() -> None:
    """Pools do not notice when their parent is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_in_worker(shard: Shard) -> int:
    tokenizer, corpora = _worker
    whole = shard.with_corpus(corpora[shard.source])
    whole.write(tokenizer, lambda _: None)
    return whole.split.n_bytes


class TokenizingProgress(Progress):
    """A bar on standard error (bytes of text, MB/s, time left), or a line a minute if there is no terminal."""

    def __init__(self, total_bytes: int, done_bytes: int, show: bool, say: Say):
        columns = TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        super().__init__(*columns, console=Console(stderr=True), disable=not show, transient=True)
        self.add_task("", total=total_bytes, completed=done_bytes)
        (self._work,) = self.tasks
        self._found, self._say = done_bytes, say
        self._next_line_s = math.inf if show else _LINE_EVERY_S

    def done(self, n_bytes: int) -> None:
        work = self._work
        self.update(work.id, advance=n_bytes)
        if self.seconds > self._next_line_s:
            self._next_line_s = self.seconds + _LINE_EVERY_S
            self._say(
                f"data: {work.completed / 1e9:.2f} of {work.total / 1e9:.2f} GB tokenized, "
                f"{self.bytes_per_s / 1e6:.1f} MB/s, about {work.remaining / self.bytes_per_s / 60:.0f} minutes left"
            )

    @property
    def seconds(self) -> float:
        return self._work.elapsed

    @property
    def bytes_per_s(self) -> float:
        """Speed of this process, without the shards that were already there."""
        return (self._work.completed - self._found) / max(self.seconds, 1e-9)


@dataclass
class SourceTokens:
    """The tokenized documents of a source's split."""

    files: Sequence[Path]
    """Raw token files in order; a document may continue in the next one."""
    counts: Counts
    """Of all files."""
    weight: float
    taken: int = 0
    """Tokens that went into the mixture."""
    documents: int = 0
    """Documents that went into the mixture."""

    @property
    def tokens_per_weight(self) -> float:
        return self.taken / self.weight

    @property
    def passes(self) -> float:
        """How often the source was used."""
        return self.taken / self.counts.tokens

    def mixed_counts(self) -> Counts:
        """The source's part of the mixture; the text of an incomplete pass is estimated by its share of the tokens."""
        if self.taken == self.counts.tokens:
            return self.counts
        n_bytes, replaced = (round(number * self.passes) for number in (self.counts.bytes, self.counts.replaced))
        return Counts(self.documents, n_bytes, self.taken, replaced)


def interleave(sources: Sequence[SourceTokens], eot: int, dtype: np.dtype, file: Path) -> None:
    """Writes whole documents of the sources to `file`, in proportion to their weights, and updates `taken`.

    The next document always comes from the source with the fewest tokens per weight so far (the first of equals), so
    that shares are within one document of the weights. A source that ends starts again; the mixture is complete when
    every source was used once and the others have caught up.
    """
    endless = [_endless(source.files, eot, dtype) for source in sources]
    n_unfinished, goal = len(sources), 0.0
    with file.open("wb") as out:
        while True:
            i = min(range(len(sources)), key=lambda i: sources[i].tokens_per_weight)
            source = sources[i]
            if not n_unfinished and source.tokens_per_weight >= goal:
                return
            document = next(endless[i])
            out.write(document)
            first_pass = source.taken < source.counts.tokens
            source.taken += len(document)
            source.documents += 1
            if first_pass and source.taken >= source.counts.tokens:
                n_unfinished -= 1
                goal = max(source.tokens_per_weight for source in sources)


def _endless(files: Sequence[Path], eot: int, dtype: np.dtype) -> Iterator[memoryview]:
    """The tokens of each document with its end, over and over."""
    while True:
        rest = np.empty(0, dtype)
        for file in files:
            tokens = np.concatenate([rest, np.fromfile(file, dtype)])
            start = 0
            view = memoryview(tokens)
            for end in (np.flatnonzero(tokens == eot) + 1).tolist():
                yield view[start:end]
                start = end
            rest = tokens[start:]


def _describe_mixture(sources: Sequence[Source], tokenized: dict[str, list[SourceTokens]]) -> list[dict]:
    totals = {name: sum(source.taken for source in own) for name, own in tokenized.items()}
    return [
        {
            "path": source.corpus.source["path"],
            "weight": source.weight,
            "splits": {
                name: {
                    "share": own[i].taken / totals[name],
                    "passes": own[i].passes,
                    **own[i].mixed_counts()._asdict(),
                }
                for name, own in tokenized.items()
            },
        }
        for i, source in enumerate(sources)
    ]
