"""Makes the files of a store: split, tokenizer, shards, and the token files that the shards come to.

What takes long is kept in a folder of its own until the store is complete, so that a preparation that was killed goes
on where it was: the trained tokenizer, and every complete shard.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.mixture import TokenStream, interleave
from est_cli.data.progress import TokenizingProgress
from est_cli.data.sentencepiece_bpe import SentencePieceTokenizer, SentencePieceTraining
from est_cli.data.shards import Shard, choose_workers, tokenize_shards
from est_cli.data.sources import Source, sample_sources, split_sources
from est_cli.data.splits import Split
from est_cli.data.token_files import Counts, token_dtype
from est_cli.data.tokenizers import Tokenizer, load_tokenizer

SPLITS = ("train", "val")
SHARD_BYTES = 16 << 20
"""Text of a shard, about. Another size cuts long documents at other places: raise tokens._FORMAT with it."""
_WORK = "work"


def write_store(
    folder: Path,
    sources: Sequence[Source],
    data: DataConfig,
    chosen: Tokenizer | SentencePieceTraining,
    say: Say,
    show_progress: bool,
) -> dict:
    """Writes token files and the tokenizer into `folder`; returns what the manifest says of them.

    Raises UserError for text that cannot be used, OSError where the folder cannot be written.
    """
    work = folder / _WORK
    work.mkdir(exist_ok=True)
    splits = dict(zip(SPLITS, split_sources(sources, data.val_fraction), strict=True))
    tokenizer = _find_or_make_tokenizer(work / "tokenizer", chosen, sources, splits["train"], say)
    shards = {name: _shards(work, name, own) for name, own in splits.items()}
    speed = _tokenize(shards, tokenizer, work / "tokenizer", sources, data, say, show_progress)
    dtype = token_dtype(tokenizer.vocab_size)
    streams = {name: _streams(own, sources, dtype.itemsize) for name, own in shards.items()}
    for name, own in streams.items():
        _assemble(own, tokenizer.eot, dtype, folder / f"{name}.bin")
    counts = {name: reduce(Counts.__add__, (stream.mixed_counts() for stream in own)) for name, own in streams.items()}
    if replaced := sum(count.replaced for count in counts.values()):
        say(f"data: replaced {replaced} invalid UTF-8 sequences by U+FFFD")
    mixture = _describe_mixture(sources, streams) if len(sources) > 1 else []
    for source in mixture:
        say("data: " + describe_source(source))
    tokenizer.save(folder)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    origins = [source.corpus.source for source in sources]
    return {
        "source": {"kind": data.kind, "sources": origins} if mixture else origins[0],
        "val_fraction": data.val_fraction,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "dtype": dtype.str,
        "splits": {name: dataclasses.asdict(count) for name, count in counts.items()},
        "mixture": mixture,
        "packages": _package_bytes(splits) if sources[0].corpus.packages is not None else {},
        "tokenizing": speed,
        "files": files,
    }


def _package_bytes(splits: dict[str, list[Split]]) -> dict[str, dict[str, int]]:
    """Bytes of each package in each split, the largest first."""
    sizes = {}
    for name, (split,) in splits.items():
        packages, places = np.unique(split.corpus.packages[split.documents], return_inverse=True)
        n_bytes = np.bincount(places, weights=split.ends - split.starts).astype(int)
        order = np.argsort(-n_bytes, kind="stable")
        sizes[name] = {str(packages[i]): int(n_bytes[i]) for i in order}
    return sizes


def discard_work(folder: Path) -> None:
    """Removes what `write_store` needs no more."""
    shutil.rmtree(folder / _WORK, ignore_errors=True)


def has_work(folder: Path) -> bool:
    """Whether a preparation that starts again in `folder` would find something done."""
    return any((folder / _WORK).glob("*.json"))


def describe_source(source: dict) -> str:
    """A line on an entry of the manifest's `mixture`."""
    train = source["splits"]["train"]
    again = f", used {train['passes']:.2f} times" if train["passes"] > 1.005 else ""
    return f"{train['share']:.2%} {source['path']} (weight {source['weight']:.2%}), {train['tokens']:,} tokens{again}"


def _find_or_make_tokenizer(
    folder: Path, chosen: Tokenizer | SentencePieceTraining, sources: Sequence[Source], train: Sequence[Split], say: Say
) -> Tokenizer:
    """The tokenizer as `folder` holds it, where the processes read it."""
    kind = SentencePieceTokenizer.kind if isinstance(chosen, SentencePieceTraining) else chosen.kind
    if not folder.exists():
        if isinstance(chosen, SentencePieceTraining):
            chosen = chosen.train(sample_sources(sources, train, chosen.train_bytes), say)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        chosen.save(partial)
        os.replace(partial, folder)
    return load_tokenizer(kind, folder)


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
    """Writes the shards that are not there; returns how fast that went."""
    everything = [shard for own in shards.values() for of_source in own for shard in of_source]
    item_bytes = token_dtype(tokenizer.vocab_size).itemsize
    missing = [shard for shard in everything if shard.find(item_bytes) is None]
    total, left = (sum(shard.split.n_bytes for shard in some) for some in (everything, missing))
    workers = choose_workers(data.num_workers, len(missing), left, SHARD_BYTES)
    n_documents = sum(shard.split.n_documents for shard in everything)
    say(
        f"data: tokenizing {n_documents:,} {'document' if n_documents == 1 else 'documents'}, {total / 1e6:.1f} MB"
        + (f", with {workers.count} processes" if workers.count > 1 else "")
        + (f"; {len(everything) - len(missing)} of {len(everything)} shards were there" if left < total else "")
    )
    with TokenizingProgress(total, total - left, show_progress, say) as progress:
        corpora = [source.corpus for source in sources]
        tokenize_shards(missing, tokenizer, tokenizer_folder, corpora, workers, progress.advance)
    speed = progress.bytes_per_s / 1e6
    say(f"data: tokenized in {progress.seconds:.1f} s ({speed:.1f} MB/s)")
    return {"seconds": progress.seconds, "mb_per_s": speed, "processes": workers.count}


def _streams(shards: Sequence[Sequence[Shard]], sources: Sequence[Source], item_bytes: int) -> list[TokenStream]:
    return [
        TokenStream(
            [shard.file for shard in own],
            reduce(Counts.__add__, (shard.find(item_bytes) for shard in own)),
            source.weight,
        )
        for own, source in zip(shards, sources, strict=True)
    ]


def _assemble(streams: Sequence[TokenStream], eot: int, dtype, file: Path) -> None:
    if len(streams) > 1:
        interleave(streams, eot, dtype, file)
        return
    stream = streams[0]
    with file.open("wb") as out:
        for shard in stream.files:
            with shard.open("rb") as part:
                shutil.copyfileobj(part, out, 1 << 24)
    stream.taken, stream.documents = stream.counts.tokens, stream.counts.documents


def _describe_mixture(sources: Sequence[Source], streams: dict[str, list[TokenStream]]) -> list[dict]:
    totals = {name: sum(stream.taken for stream in own) for name, own in streams.items()}
    return [
        {
            "path": source.corpus.source["path"],
            "weight": source.weight,
            "splits": {
                name: {
                    "share": own[i].taken / totals[name],
                    "passes": own[i].passes,
                    **dataclasses.asdict(own[i].mixed_counts()),
                }
                for name, own in streams.items()
            },
        }
        for i, source in enumerate(sources)
    ]
