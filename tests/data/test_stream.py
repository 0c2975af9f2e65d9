"""data.streaming=true: the training windows of a stream do not depend on who reads it or where reading began."""

import subprocess
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from tiny_corpora import BYTE, PIECES, documents, jsonl, prepared, python

from est_cli.config import DataConfig, SourceConfig
from est_cli.data import streams
from est_cli.data.batches import training_windows
from est_cli.data.streams import shard_file
from est_cli.data.tokens import TokenStore
from est_cli.errors import UserError

ROWS = [f"row {i} " * (3 + i % 7) for i in range(400)]
SEQ_LEN = 32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streams, "VAL_BYTES", 2000)
    monkeypatch.setattr(streams, "SHARD_TOKENS", 1500)
    monkeypatch.setattr(streams, "BLOCK_WINDOWS", 16)


@pytest.fixture
def data(tmp_path, hf_data):
    (tmp_path / "a.jsonl").write_bytes(jsonl([*ROWS[:200], None, "", ROWS[0], *ROWS[200:]]))
    return hf_data(tmp_path / "a.jsonl", streaming=True)


def opened(data: DataConfig, tokenizer=BYTE) -> TokenStore:
    store = prepared(data, tokenizer)
    store.check(SEQ_LEN, 10**6)
    return store


def test_a_stream_is_its_documents_in_order_over_and_over_without_those_of_validation(data):
    store = opened(data)
    val = documents(store, store.val)
    assert val == ROWS[: len(val)]
    assert 2000 <= sum(map(len, val)) < 2100
    rest = ROWS[len(val) :]
    read = documents(store, store.train.read(0, 40_000))
    assert len(read) > 1.5 * len(rest)
    assert read == (rest * 3)[: len(read)]


def test_every_window_of_a_block_comes_once_and_every_block_has_an_order_of_its_own(data):
    train = opened(data).train
    orders = []
    for block in range(2):
        windows = training_windows(train, SEQ_LEN, seed=1, first=16 * block, count=16)
        starts = range(16 * block * SEQ_LEN, 16 * (block + 1) * SEQ_LEN, SEQ_LEN)
        in_order = [train.read(start, start + SEQ_LEN + 1).tolist() for start in starts]
        order = [in_order.index(window) for window in windows.tolist()]
        assert sorted(order) == list(range(16))
        orders.append(order)
    assert orders[0] != orders[1]
    assert not np.array_equal(training_windows(train, SEQ_LEN, 2, 0, 16), training_windows(train, SEQ_LEN, 1, 0, 16))


def test_a_window_does_not_depend_on_what_was_asked_for_before(data, tmp_path):
    one, other = opened(data).train, opened(replace(data, cache_dir=str(tmp_path / "other"))).train
    late = training_windows(one, SEQ_LEN, 0, 300, 20)
    for first in range(300):
        training_windows(other, SEQ_LEN, 0, first, 1)
    assert np.array_equal(training_windows(other, SEQ_LEN, 0, 300, 20), late)


@pytest.mark.parametrize("kept", [0, 1, 3, 15])
def test_a_stream_goes_on_exactly_where_its_last_shard_ends(kept, data, tmp_path):
    """More than one pass long, so that it also goes on from a later pass."""
    whole = opened(data)
    expected = whole.train.read(0, 30_000)
    again = replace(data, cache_dir=str(tmp_path / "again"))
    folder = opened(again).folder
    for number in range(kept):
        for suffix in (".bin", ".json"):
            file = shard_file(folder, number).with_suffix(suffix)
            file.write_bytes((whole.folder / file.name).read_bytes())
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("stream-*")}
    assert np.array_equal(opened(again).train.read(0, 30_000), expected)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}


def test_two_readers_of_one_cache_see_the_same_stream(data):
    first, second = opened(data).train, opened(data).train
    for start in range(0, 20_000, 1000):
        assert np.array_equal(first.read(start, start + 1000), second.read(start, start + 1000))


def test_a_streamed_mixture_has_its_weights_and_goes_on_exactly(data, tmp_path):
    code = tmp_path / "code.jsonl"
    code.write_bytes(jsonl((f"code({i})\n" * 5 for i in range(100)), column="content"))
    sources = (SourceConfig(data.path, 7), SourceConfig(str(code), 3, column="content"))
    store = opened(replace(data, path=None, sources=sources))
    tokens = store.train.read(0, 30_000)
    texts = documents(store, tokens)
    assert sum(len(text) + 1 for text in texts if text.startswith("code")) / 30_000 == pytest.approx(0.3, abs=0.01)
    for number in range(5, 30):
        shard_file(store.folder, number).with_suffix(".json").unlink(missing_ok=True)
    again = TokenStore(store.folder, store._sources)
    assert np.array_equal(again.train.read(0, 30_000), tokens)


def test_a_tokenizer_is_trained_on_the_head_of_the_stream(data):
    store = opened(data, replace(PIECES, vocab_size=300, train_bytes=3000))
    assert documents(store, store.train.read(0, 2000))[0] == ROWS[len(documents(store, store.val))]


def test_a_split_of_its_own_validates(tmp_path, data):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, rows in (("train", ROWS[:300]), ("validation", ROWS[300:])):
        (folder / f"{name}.jsonl").write_bytes(jsonl(rows))
    store = opened(replace(data, path=str(folder), val_split="validation"))
    val = documents(store, store.val)
    assert val == ROWS[300 : 300 + len(val)]
    assert documents(store, store.train.read(0, 3000))[0] == ROWS[0]


def test_what_goes_wrong_while_training_reaches_the_one_who_waits(data, monkeypatch):
    train = opened(data).train

    monkeypatch.setattr(streams.ShardWriter, "write", Mock(side_effect=OSError("the network went away")))
    with pytest.raises(OSError, match="went away"):
        training_windows(train, SEQ_LEN, 0, 0, 4)


def test_streams_that_cannot_be_are_refused(data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data\.column=txt: must be one of text"):
        opened(replace(data, column="txt"))
    monkeypatch.setattr(streams, "VAL_BYTES", 10**6)
    with pytest.raises(UserError, match=r"has no more; use data\.streaming=false"):
        opened(data)


def test_a_process_that_ends_while_a_shard_is_written_ends_in_silence(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(f"{row}\n" * 300 for row in ROWS))
    command = python(
        "streams.VAL_BYTES = 2000",
        "data = DataConfig(kind='hf', path=sys.argv[1], streaming=True, cache_dir=sys.argv[2])",
        "tokens.open_store(data, PIECES, 512, print, False).train.read(0, 100)",
    )
    command += [str(tmp_path / "a.jsonl"), str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
