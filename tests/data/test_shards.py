"""Tokenizing by shards: the same bytes with any number of processes, and after a kill."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_corpora import Documents, prose

from est_cli.config import TokenizerConfig
from est_cli.data import preparation
from est_cli.data.preparation import Shard, choose_workers
from est_cli.data.splits import Split, split_corpus
from est_cli.data.tokens import cache_folder, prepare
from est_cli.errors import UserError

BYTE = TokenizerConfig("byte")
PIECES = TokenizerConfig("sentencepiece", vocab_size=400)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_BYTES", 10_000)


def texts(splits: list[Split]) -> list[str]:
    """Whole documents, put together from consecutive shards."""
    whole, parts = [], []
    for piece in (piece for split in splits for piece in split.pieces()):
        assert piece.continued == bool(parts)
        parts.append(piece.text)
        if piece.last:
            whole.append("".join(parts))
            parts = []
    assert not parts
    return whole


@pytest.mark.parametrize("shard_bytes", [16, 100, 1000, 10**6])
def test_shards_hold_the_documents_of_their_split_once_and_in_order(shard_bytes):
    documents = [("é字 line\n" * n).encode() for n in (1, 40, 0, 3, 3, 500, 2)] + ["😀".encode() * 300]
    split, _ = split_corpus(Documents(*documents, given_val=np.array([False] * 7 + [True])), 0.1)
    shards = split.shards(shard_bytes)
    assert texts(shards) == texts([split])
    assert all(0 < shard.n_bytes < 3 * shard_bytes for shard in shards)
    assert sum(shard.n_documents for shard in shards) == split.n_documents == 6


def test_a_long_document_is_cut_after_newlines():
    split, _ = split_corpus(Documents(prose(400).encode(), b"val", given_val=np.array([False, True])), 0.1)
    *firsts, _ = split.shards(3000)
    assert len(firsts) > 3
    assert all(list(shard.pieces())[-1].text.endswith("\n") for shard in firsts)


@pytest.mark.parametrize("tokenizer", [BYTE, PIECES], ids=["byte", "sentencepiece"])
def test_processes_and_shards_do_not_change_the_token_files(tokenizer, corpus_folder, text_data, tmp_path, monkeypatch):
    stores = []
    for place, num_workers, shard_bytes in (("a", 1, 10_000), ("b", 2, 10_000), ("c", "auto", 10**7)):
        monkeypatch.setattr(preparation, "SHARD_BYTES", shard_bytes)
        data = replace(text_data(corpus_folder), cache_dir=str(tmp_path / place), num_workers=num_workers)
        stores.append(prepare(data, tokenizer, 512, lambda _: None, False))
    assert [store.manifest["tokenizing"]["processes"] for store in stores] == [1, 2, 1]
    assert len({store.fingerprint for store in stores}) == 1
    for name in ("train.bin", "val.bin"):
        assert len({(store.folder / name).read_bytes() for store in stores}) == 1
    assert [store.manifest["splits"] for store in stores[1:]] == [stores[0].manifest["splits"]] * 2


def test_a_preparation_that_was_killed_goes_on_where_it_was(corpus_folder, text_data, tmp_path, monkeypatch):
    data = replace(text_data(corpus_folder), num_workers=1)
    script = (
        "import os, signal, sys\n"
        "from est_cli.config import DataConfig, TokenizerConfig\n"
        "from est_cli.data import preparation, tokens\n"
        "preparation.SHARD_BYTES = 10_000\n"
        "write, left = preparation.Shard.write, [2]\n"
        "def killed(shard, *arguments):\n"
        "    if not left[0]:\n"
        "        (shard.file.with_suffix('.123')).write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1\n"
        "    write(shard, *arguments)\n"
        "preparation.Shard.write = killed\n"
        "data = DataConfig(kind='text', path=sys.argv[1], cache_dir=sys.argv[2], num_workers=1)\n"
        "tokens.prepare(data, TokenizerConfig('sentencepiece', vocab_size=400), 512, print, False)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(corpus_folder), data.cache_dir], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.suffix for path in cache_folder(data).iterdir() if path.is_dir()] == [".partial"]

    written, said, write = [], [], Shard.write
    monkeypatch.setattr(Shard, "write", lambda shard, *rest: (written.append(shard.file.name), write(shard, *rest)))
    store = prepare(data, PIECES, 512, said.append, False)
    assert not any("training" in line for line in said[:-1])
    assert any("2 of 8 shards were there" in line for line in said), said
    assert written == [f"train-0-{i:06}.bin" for i in range(2, 7)] + ["val-0-000000.bin"]
    whole = prepare(replace(data, cache_dir=str(tmp_path / "whole")), PIECES, 512, said.append, False)
    for name in ("train.bin", "val.bin", "tokenizer.model"):
        assert (store.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(path.name for path in whole.folder.iterdir())
    assert [path for path in cache_folder(data).iterdir() if path.is_dir()] == [store.folder]


def test_a_shard_whose_file_is_cut_short_is_not_taken_for_done(tmp_path):
    split, _ = split_corpus(Documents(prose(50).encode()), 0.1)
    shard = Shard(0, split, tmp_path / "train-0-000000.bin")
    assert shard.find(2) is None
    shard.write(preparation.load_tokenizer("byte", tmp_path), 1, lambda _: None)
    assert shard.find(2).tokens == split.n_bytes + 1
    shard.file.write_bytes(shard.file.read_bytes()[:-1])
    assert shard.find(2) is None


def test_a_full_disk_keeps_what_was_tokenized_and_says_where(corpus_folder, text_data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    data, said = text_data(corpus_folder), []
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"data\.cache_dir=.*No space left"):
        patch.setattr(preparation, "_assemble", full)
        prepare(data, BYTE, 512, said.append, False)
    (kept,) = (path for path in cache_folder(data).iterdir() if path.is_dir())
    assert str(kept) in said[-1]
    said.clear()
    prepare(data, BYTE, 512, said.append, False)
    assert any("8 of 8 shards were there" in line for line in said)


def test_a_worker_that_cannot_read_its_text_ends_the_preparation_with_its_message(text_data, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text(prose(2000))
    choose = preparation.choose_workers

    def shorten(*arguments):
        file.write_text(prose(100))
        return choose(*arguments)

    monkeypatch.setattr(preparation, "choose_workers", shorten)
    with pytest.raises(UserError, match="became shorter"):
        prepare(replace(text_data(file), num_workers=2), BYTE, 512, lambda _: None, False)


def test_auto_starts_processes_for_large_text_only(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    count = {n_bytes: choose_workers("auto", 100, n_bytes, 1000) for n_bytes in (10, 1999, 3500, 10**6)}
    assert count == {10: 1, 1999: 1, 3500: 3, 10**6: 8}
    assert [choose_workers(3, n_shards, 10, 1000) for n_shards in (0, 2, 9)] == [1, 2, 3]


def test_the_manifest_says_how_fast_it_went(corpus_folder, text_data):
    store = prepare(text_data(corpus_folder), BYTE, 512, lambda _: None, False)
    tokenizing = json.loads((store.folder / "manifest.json").read_text())["tokenizing"]
    assert tokenizing["mb_per_s"] > 0 < tokenizing["seconds"]
