"""Token files by shards and from mixtures: the same bytes with any number of processes, and in proportion."""

import json
import signal
import subprocess
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from tiny_corpora import BYTE, PIECES, Documents, documents, jsonl, prepared, prose, python, refusal, texts

from est_cli.config import DataConfig, SourceConfig
from est_cli.data import preparation
from est_cli.data.disk import cache_folder
from est_cli.data.preparation import Counts, Shard, SourceTokens, choose_workers, interleave
from est_cli.data.splits import open_sources, split_corpus, split_sources
from est_cli.data.tokens import current_text, inspect
from est_cli.errors import UserError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_BYTES", 10_000)


@pytest.mark.parametrize("shard_bytes", [16, 100, 1000, 10**6])
def test_shards_hold_the_documents_of_their_split_once_and_in_order(shard_bytes):
    documents = [("é字 line\n" * n).encode() for n in (1, 40, 0, 3, 3, 500, 2)] + ["😀".encode() * 300]
    split, _ = split_corpus(Documents(*documents, given_val=np.array([False] * 7 + [True])), 0.1)
    shards = split.shards(shard_bytes)
    assert texts(*shards) == texts(split)
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
        stores.append(prepared(data, tokenizer))
    assert [store.manifest["tokenizing"]["processes"] for store in stores] == [1, 2, 1]
    assert len({store.fingerprint for store in stores}) == 1
    for name in ("train.bin", "val.bin"):
        assert len({(store.folder / name).read_bytes() for store in stores}) == 1
    assert [store.manifest["splits"] for store in stores[1:]] == [stores[0].manifest["splits"]] * 2


def test_a_preparation_that_was_killed_goes_on_where_it_was(corpus_folder, text_data, tmp_path, monkeypatch):
    data = replace(text_data(corpus_folder), num_workers=1)
    command = python(
        "import os, signal",
        "preparation.SHARD_BYTES = 10_000",
        "write, left = preparation.Shard.write, [2]",
        "def killed(shard, *arguments):",
        "    if not left[0]:",
        "        shard.file.with_name('.half').write_bytes(b'half')",
        "        os.kill(os.getpid(), signal.SIGKILL)",
        "    left[0] -= 1",
        "    write(shard, *arguments)",
        "preparation.Shard.write = killed",
        "data = DataConfig(kind='text', path=sys.argv[1], cache_dir=sys.argv[2], num_workers=1)",
        "tokens.open_store(data, PIECES, 512, print, False)",
    )
    killed = subprocess.run([*command, str(corpus_folder), data.cache_dir], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.suffix for path in cache_folder(data).iterdir() if path.is_dir()] == [".partial"]

    written, said, write = [], [], Shard.write
    monkeypatch.setattr(Shard, "write", lambda shard, *rest: (written.append(shard.file.name), write(shard, *rest)))
    store = prepared(data, PIECES, say=said.append)
    assert not any("training" in line for line in said[:-1])
    assert any("2 of 8 shards were there" in line for line in said), said
    assert written == [f"train-0-{i:06}.bin" for i in range(2, 7)] + ["val-0-000000.bin"]
    whole = prepared(replace(data, cache_dir=str(tmp_path / "whole")), PIECES)
    for name in ("train.bin", "val.bin", "tokenizer.model"):
        assert (store.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(path.name for path in whole.folder.iterdir())
    assert [path for path in cache_folder(data).iterdir() if path.is_dir()] == [store.folder]


def test_a_full_disk_keeps_what_was_tokenized_and_says_where(corpus_folder, text_data, monkeypatch):
    data, said = text_data(corpus_folder), []
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"data\.cache_dir=.*No space left"):
        patch.setattr(preparation, "interleave", Mock(side_effect=OSError(28, "No space left on device")))
        prepared(data, say=said.append)
    (kept,) = (path for path in cache_folder(data).iterdir() if path.is_dir())
    assert str(kept) in said[-1]
    said.clear()
    prepared(data, say=said.append)
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
        prepared(text_data(file, num_workers=2))


def test_auto_starts_processes_for_large_text_only(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    count = {n_bytes: choose_workers("auto", 100, n_bytes) for n_bytes in (10, 19_999, 35_000, 10**7)}
    assert count == {10: 1, 19_999: 1, 35_000: 3, 10**7: 8}
    assert [choose_workers(3, n_shards, 10) for n_shards in (0, 2, 9)] == [1, 2, 3]


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """A mixture of prose and code, 600 and 200 rows."""
    folder = tmp_path_factory.mktemp("mix")
    prose, code = folder / "prose.jsonl", folder / "code.jsonl"
    prose.write_bytes(jsonl(f"prose {i} " * (3 + i % 5) for i in range(600)))
    code.write_bytes(jsonl((f"code({i})\n" * (2 + i % 9) for i in range(200)), column="content"))
    sources = (SourceConfig(str(prose), 7), SourceConfig(str(code), 3, column="content"))
    return DataConfig(kind="hf", sources=sources, val_fraction=0.1, cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def mixed(mix):
    """The token files of the mixture, and what was told."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SHARD_BYTES", 10_000)
        return prepared(mix, say=said.append), said


def share_of_code(tokens: list[str]) -> float:
    code = sum(len(text) + 1 for text in tokens if text.startswith("code"))
    return code / sum(len(text) + 1 for text in tokens)


def test_every_stretch_of_both_splits_has_the_weights(mixed):
    store, _ = mixed
    train, val = documents(store, store.train), documents(store, store.val)
    for read, within in ((train, 0.02), (val, 0.1)):
        assert share_of_code(read) == pytest.approx(0.3, abs=within)
        assert share_of_code(read[: len(read) // 2]) == pytest.approx(0.3, abs=within)
    assert not set(train) & set(val)


def test_no_text_is_left_out_and_a_source_that_ends_starts_again(mixed):
    store, said = mixed
    train = documents(store, store.train)
    assert len({*train, *documents(store, store.val)}) == 800
    prose, code = store.manifest["mixture"]
    assert prose["splits"]["train"]["passes"] == pytest.approx(1, abs=0.01)
    assert code["splits"]["train"]["passes"] > 1.05
    again = [text for text in train if text.startswith("code")]
    n_codes = len(set(again))
    assert again[n_codes:] == again[: len(again) - n_codes]
    (line,) = (line for line in said if "code.jsonl" in line and "used" in line)
    assert f"used {code['splits']['train']['passes']:.2f} times" in line


def test_the_achieved_weights_are_in_the_manifest_and_the_inspection(mixed, mix):
    store, _ = mixed
    facts = json.loads(json.dumps(inspect(store)))
    train = store.manifest["splits"]["train"]
    for source, given, weight in zip(facts["mixture"], mix.sources, (0.7, 0.3), strict=True):
        own = source["splits"]["train"]
        assert (source["path"], source["weight"]) == (given.path, pytest.approx(weight))
        assert own["share"] == own["tokens"] / train["tokens"] == pytest.approx(source["weight"], abs=0.02)
    texts = documents(store, store.train)
    assert (train["documents"], train["tokens"]) == (len(texts), len(store.train))
    assert train["bytes"] == pytest.approx(sum(map(len, texts)), rel=0.01)
    assert [source["column"] for source in facts["source"]["sources"]] == ["text", "content"]
    assert facts["tokenizing"]["mb_per_s"] > 0 < facts["tokenizing"]["seconds"]


def test_a_mixture_is_the_same_with_several_processes(mixed, mix, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_BYTES", 3000)
    one, two = mixed[0], prepared(replace(mix, cache_dir=str(tmp_path), num_workers=2))
    assert one.fingerprint == two.fingerprint
    assert one.train.tobytes() == two.train.tobytes()


def test_sources_and_weights_decide_the_fingerprint_but_their_scale_does_not(mixed, mix):
    def fingerprint(*weights):
        sources = tuple(replace(source, weight=weight) for source, weight in zip(mix.sources, weights, strict=True))
        return current_text(replace(mix, sources=sources)).fingerprint

    assert fingerprint(7, 3) == fingerprint(0.7, 0.3) == mixed[0].text.fingerprint != fingerprint(5, 5)


def test_a_tokenizer_for_a_mixture_is_trained_on_all_sources(mix):
    tokenizer = prepared(mix, replace(PIECES, vocab_size=300)).tokenizer
    for text in ("prose 17 prose 17 ", "code(17)\n"):
        assert len(tokenizer.encode(text)) < len(text)


def test_text_that_one_source_validates_on_is_not_in_the_training_split_of_another(mix, tmp_path):
    other = tmp_path / "other.jsonl"
    rows = [f"prose {i} " * (3 + i % 5) for i in range(0, 600, 3)]
    other.write_bytes(jsonl([*rows, *(f"other {i}" for i in range(900))]))
    data = replace(mix, sources=(mix.sources[0], SourceConfig(str(other), 1)))
    sides = split_sources(open_sources(data, print), data.val_fraction)
    trained, held_out = ({*texts(*side)} for side in sides)
    assert not held_out & trained


def files_of(folder, name: str, *parts: list[int]) -> list:
    """Token files, one for each part."""
    files = [folder / f"{name}{i}" for i in range(len(parts))]
    for file, tokens in zip(files, parts, strict=True):
        np.array(tokens, "<u2").tofile(file)
    return files


@pytest.mark.parametrize(
    ("first", "second", "mixed", "used"),
    [
        (
            [[1, 0, 2, 2, 0, 3, 0]],
            [9, 9, 9, 0],
            [1, 0, 9, 9, 9, 0, 2, 2, 0, 9, 9, 9, 0, 3, 0, 1, 0],
            [(9, 4, 9 / 7), (8, 2, 2)],
        ),
        ([[1, 0, 2], [2, 2], [2, 0]], [9, 0], [1, 0, 9, 0, 2, 2, 2, 2, 0, *[9, 0] * 3], [(7, 2, 1), (8, 4, 4)]),
    ],
    ids=["the source that is furthest behind is next", "a document that goes on in the next file stays whole"],
)
def test_sources_are_mixed_document_by_document(first, second, mixed, used, tmp_path):
    counts = Counts(3, 4, 7), Counts(1, 3, len(second))
    files = files_of(tmp_path, "a", *first), files_of(tmp_path, "b", second)
    sources = [SourceTokens(*own, weight=0.5) for own in zip(files, counts, strict=True)]
    interleave(sources, 0, np.dtype("<u2"), tmp_path / "out")
    assert np.fromfile(tmp_path / "out", "<u2").tolist() == mixed
    assert [(source.taken, source.documents, source.passes) for source in sources] == used


def test_without_a_terminal_progress_is_a_line_now_and_then(said, monkeypatch):
    monkeypatch.setattr(preparation, "_LINE_EVERY_S", 0)
    with preparation.TokenizingProgress(4 * 10**9, 10**9, False, said.append) as progress:
        progress.done(10**9)
    assert said[0].startswith("data: 2.00 of 4.00 GB tokenized, ") and said[0].endswith(" minutes left")


def test_problems_name_their_source_and_come_together(mix, tmp_path, monkeypatch):
    monkeypatch.setattr("est_cli.data.hub.answers", lambda: False)
    lost = replace(mix, sources=(SourceConfig("./nowhere.jsonl", 7), *mix.sources, SourceConfig("owner/name", 1)))
    for streaming in (False, True):
        first, second, override = refusal(prepared, replace(lost, streaming=streaming)).splitlines()
        assert first.startswith("data.sources[0].path=./nowhere.jsonl: ")
        assert second.startswith("data.sources[3].path=owner/name: ") and "hf download owner/name" in second
        assert "data.sources=[{path:./nowhere.jsonl,weight:7}," in override
    columns = replace(mix, sources=(mix.sources[0], replace(mix.sources[1], column="text")))
    assert refusal(prepared, columns).startswith("data.sources[1].column=text: must be one of content")
    (tmp_path / "empty.jsonl").write_bytes(jsonl([""]))
    empty = replace(mix, sources=(*mix.sources, SourceConfig(str(tmp_path / "empty.jsonl"), 1)))
    assert refusal(prepared, empty) == "data.sources[2]: holds no text"
