"""Text → token files → batches. Imports no torch.

disk           local files: the cache, which ones a path names, their hashes
corpora        where documents come from: standard library, packages, text files
dataset_files  the local files of data=hf, the split of each, and their rows
hub            datasets and single files from the Hugging Face hub
hf_corpus      the documents of data=hf, as a whole or as a stream
splits         sources, their training and validation documents, and their text in pieces
tokenizers     text → ids: bytes, SentencePiece, Hugging Face
preparation    splits → token files, in shards, by several processes
batches        windows of the token files, and their shuffle
streams        the token shards of data.streaming=true, written while training goes on
run_data       what a run keeps of its data
tokens         the token store: finds it in the cache or makes it

A file imports only those above it.
"""

from collections.abc import Callable

from est_cli.lazy import on_demand

Say = Callable[[str], None]
"""Takes one line that the user should read."""

__getattr__ = on_demand(__name__)
