"""Makes the files of a streamed store: the tokenizer and validation, both from the head of the stream."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.sentencepiece_bpe import SentencePieceTraining
from est_cli.data.sources import Source
from est_cli.data.stream_shards import Feed, ShardWriter, text_key
from est_cli.data.token_files import Counts, token_dtype
from est_cli.data.tokenizers import Tokenizer
from est_cli.errors import UserError

VAL_BYTES = 8 << 20
"""Text at the head of the stream that validation gets; about 2 million tokens."""
_KEYS = "val-keys.bin"


def write_streamed_store(
    folder: Path, sources: Sequence[Source], data: DataConfig, chosen: Tokenizer | SentencePieceTraining, say: Say
) -> dict:
    """Writes validation and the tokenizer into `folder`; returns what the manifest says of them.

    Raises UserError for streams that cannot be read or are too short.
    """
    say(f"data: reading {VAL_BYTES / 1e6:.1f} MB of the stream for validation")
    vals = [_head(source.corpus.val_texts().one_pass(), int(VAL_BYTES * source.weight)) for source in sources]
    keys = b"".join(sorted({text_key(text) for texts in vals for text in texts}))
    (folder / _KEYS).write_bytes(keys)
    skipped = read_keys(folder)
    training = isinstance(chosen, SentencePieceTraining)
    n_bytes = chosen.train_bytes if training else 1
    heads = [_training_head(source, skipped, n_bytes) for source in sources]
    tokenizer = chosen.train([text for head in heads for text in head], say) if training else chosen
    dtype = token_dtype(tokenizer.vocab_size)
    counts = _write(vals, tokenizer, dtype, folder / "val.bin")
    tokenizer.save(folder)
    origins = [source.corpus.source for source in sources]
    return {
        "source": origins[0] if len(origins) == 1 else {"kind": data.kind, "streaming": True, "sources": origins},
        "streaming": True,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "dtype": dtype.str,
        "splits": {"val": dataclasses.asdict(counts)},
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
    }


def open_writer(folder: Path, sources: Sequence[Source], tokenizer: Tokenizer) -> ShardWriter:
    """What writes the training tokens of the store in `folder`."""
    skipped = read_keys(folder)
    feeds = [Feed(source.corpus.training_texts(), source.weight, tokenizer, skipped) for source in sources]
    return ShardWriter(folder, feeds, token_dtype(tokenizer.vocab_size))


def read_keys(folder: Path) -> frozenset[bytes]:
    """Keys of the documents of validation, which training skips."""
    keys = (folder / _KEYS).read_bytes()
    return frozenset(keys[i : i + 8] for i in range(0, len(keys), 8))


def _training_head(source: Source, skipped: frozenset[bytes], n_bytes: int) -> list[str]:
    texts = (text for text in source.corpus.training_texts().one_pass() if text_key(text) not in skipped)
    head = _head(texts, int(n_bytes * source.weight))
    if not head:
        raise UserError(
            f"data.streaming=true: validation takes {VAL_BYTES:,} bytes at the head, and the stream of "
            f"{source.corpus.source['path']} has no more; use data.streaming=false"
        )
    return head


def _head(texts: Iterable[str], n_bytes: int) -> list[str]:
    """The first texts, until they come to `n_bytes`."""

    def head() -> Iterator[str]:
        left = n_bytes
        for text in texts:
            yield text
            left -= len(text.encode("utf-8", "replace"))
            if left <= 0:
                return

    return list(head())


def _write(vals: Sequence[Sequence[str]], tokenizer: Tokenizer, dtype: np.dtype, file: Path) -> Counts:
    texts = [text for texts in vals for text in texts]
    documents = [np.append(ids, tokenizer.eot) for ids in tokenizer.encode_batch(texts)]
    tokens = np.concatenate(documents).astype(dtype)
    tokens.tofile(file)
    return Counts(len(texts), sum(len(text.encode("utf-8", "replace")) for text in texts), len(tokens), 0)
