"""Token files: what is in them, when they are made again, several processes at once, and what est-data shows."""

import json
import math
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from unittest.mock import Mock

import filelock
import numpy as np
import platformdirs
import pytest
from tiny_corpora import BYTE, PIECES, documents, prepared, prose, python, refusal
from tokenizers import Tokenizer, models, normalizers

from est_cli.config import DataConfig, TokenizerConfig
from est_cli.data.batches import training_windows
from est_cli.data.disk import cache_folder
from est_cli.data.tokens import TokenStore, count_tokens, inspect, open_store, unigram_entropy
from est_cli.errors import UserError


def is_built(said: list[str]) -> bool:
    return any("data: tokenizing" in line for line in said)


@pytest.mark.parametrize(("tokenizer", "vocab_size", "eot"), [(BYTE, 257, 256), (PIECES, 400, 1)])
def test_token_files_hold_every_document_once_with_its_end_as_the_manifest_says(
    tokenizer, vocab_size, eot, corpus_folder, text_data
):
    store = prepared(text_data(corpus_folder, val_fraction=0.1), tokenizer)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["source"] == {"kind": "text", "path": str(corpus_folder)}
    keys = ("fingerprint", "tokenizer", "vocab_size", "eot", "dtype")
    assert [manifest[key] for key in keys] == [store.fingerprint, tokenizer.kind, vocab_size, eot, "<u2"]
    read = {name: documents(store, getattr(store, name)) for name in ("train", "val")}
    assert sorted(read["train"] + read["val"]) == sorted(file.read_text() for file in corpus_folder.rglob("*.txt"))
    for name, texts in read.items():
        tokens, counts = getattr(store, name), manifest["splits"][name]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(text.encode()) for text in texts) == store.tokenizer.token_bytes[tokens].sum()
        assert counts["tokens"] == len(tokens) == (store.folder / f"{name}.bin").stat().st_size / 2
        assert tokens[-1] == store.tokenizer.eot


def test_a_vocabulary_above_65536_takes_four_bytes(corpus_folder, text_data, monkeypatch):
    monkeypatch.setattr("est_cli.data.tokenizers.ByteTokenizer.vocab_size", 1 << 17)
    assert prepared(text_data(corpus_folder), model_vocab_size=1 << 17).train.dtype == np.uint32


def test_the_cache_is_used_again_and_follows_what_decides_it(corpus_folder, text_data, tmp_path, said):
    data = text_data(corpus_folder)
    first = prepared(data)
    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    for same in (data, text_data(copy)):
        assert prepared(same, say=said.append).folder == first.folder
    assert len(said) == 2 and not is_built(said)
    changed = [(data, PIECES), (data, replace(PIECES, train_bytes=1000))]
    changed += [(replace(data, val_fraction=0.2), BYTE), (replace(data, path=str(corpus_folder / "sub")), BYTE)]
    assert len({first.folder, *(prepared(*other).folder for other in changed)}) == 5


@pytest.mark.parametrize(
    ("name", "left"),
    [("train.bin", 100), ("val.bin", None), ("manifest.json", 1), ("manifest.json", None), ("tokenizer.model", None)],
)
def test_a_cache_cut_short_is_told_and_made_again(name, left, corpus_folder, text_data):
    data, said = text_data(corpus_folder), []
    store = prepared(data, PIECES)
    before = store.train.tobytes()
    assert TokenStore(store.folder).tokenizer.definition == store.tokenizer.definition
    if left is None:
        (store.folder / name).unlink()
    else:
        os.truncate(store.folder / name, left)
    with pytest.raises(UserError, match="cut short"):
        TokenStore(store.folder)
    assert prepared(data, PIECES, say=said.append).train.tobytes() == before
    assert any("cut short" in line for line in said)


def test_what_an_interrupted_process_left_is_cleared(corpus_folder, text_data, monkeypatch):
    data = text_data(corpus_folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("est_cli.data.tokenizers.ByteTokenizer.save", Mock(side_effect=KeyboardInterrupt))
        prepared(data)
    cache = cache_folder(data)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    store = prepared(data)
    left = store.folder.with_name(store.folder.name + ".partial")
    store.folder.rename(left)
    prepared(data)
    assert [path for path in cache.iterdir() if path.is_dir()] == [store.folder]


def test_at_most_train_bytes_train_the_pieces(corpus_folder, text_data, said):
    prepared(text_data(corpus_folder), replace(PIECES, train_bytes=20_000), say=said.append)
    assert "tokenizer: training 400 pieces on 0.0 M characters" in said


def test_problems_of_the_tokenizer_and_of_the_text_come_together(text_data, tmp_path):
    said = refusal(prepared, text_data(tmp_path / "no text"), TokenizerConfig("sentencepiece", path="no.model"))
    assert [problem.split("=")[0] for problem in said.splitlines()] == ["tokenizer.path", "data.path"]


def test_two_processes_that_start_at_once_make_it_once(corpus_folder, text_data):
    data = text_data(corpus_folder)
    command = python(
        "data = DataConfig(kind='text', path=sys.argv[1], cache_dir=sys.argv[2])",
        "store = tokens.open_store(data, PIECES, 512, print, False)",
        "print(int(store.train.sum()), int(store.val.sum()))",
    )
    command += [str(corpus_folder), data.cache_dir]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("data: tokenizing" in output for output, _ in outputs) == 1
    assert len({output.splitlines()[-1] for output, _ in outputs}) == 1


def test_a_process_that_waits_for_another_says_so(corpus_folder, text_data):
    data, said, waiting = text_data(corpus_folder), [], threading.Event()

    def say(line):
        said.append(line)
        if "waiting" in line:
            waiting.set()

    folder = prepared(data).folder
    (folder / "manifest.json").unlink()
    with filelock.FileLock(f"{folder}.lock"):
        other = threading.Thread(target=prepared, args=(data,), kwargs={"say": say})
        other.start()
        assert waiting.wait(timeout=20)
    other.join(timeout=20)
    assert not other.is_alive()
    assert is_built(said)


@pytest.mark.parametrize("place", ["file/below", "x" * 300])
def test_a_cache_that_cannot_be_written_is_named(place, corpus_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir="):
        prepared(DataConfig(kind="text", path=str(corpus_folder), cache_dir=str(tmp_path / place)))


def test_the_cache_is_the_users_unless_told_otherwise(monkeypatch, tmp_path):
    assert cache_folder(DataConfig(kind="stdlib")) == platformdirs.user_cache_path("est-cli", appauthor=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cache_folder(DataConfig(kind="stdlib", cache_dir="~/here")) == tmp_path / "here"
    assert cache_folder(DataConfig(kind="stdlib", cache_dir="here")) == tmp_path / "here"


@pytest.mark.parametrize("tokenizer", [BYTE, PIECES, None], ids=["byte", "sentencepiece", "with a dummy prefix"])
@pytest.mark.parametrize("text", ["é value, " * 200_000, prose(30_000)], ids=["one line", "lines"])
def test_a_long_document_keeps_every_character(text, tokenizer, tmp_path, text_data, llama_file):
    (tmp_path / "long.txt").write_text(text)
    store = prepared(text_data(tmp_path / "long.txt"), tokenizer or replace(PIECES, path=str(llama_file)))
    assert documents(store, store.train)[0] + documents(store, store.val)[0] == text


def test_progress_goes_to_standard_error_and_only_when_asked(corpus_folder, text_data, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    open_store(text_data(corpus_folder), BYTE, 512, lambda _: None, show_progress=False)
    assert capsys.readouterr() == ("", "")
    open_store(text_data(corpus_folder, val_fraction=0.3), BYTE, 512, lambda _: None, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokenizing" in err


def test_a_text_too_small_for_a_step_names_the_keys_and_numbers(tmp_path, text_data):
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    store = prepared(text_data(tmp_path / "a.txt", val_fraction=0.1))
    train, val = len(store.train), len(store.val)
    store.check(seq_len=val - 1, sequences_per_step=(train - 1) // (val - 1))
    training, validation = refusal(store.check, seq_len=val, sequences_per_step=train).splitlines()
    assert all(word in training for word in (f"={val}", "trainer.batch_size", str(train), str(val * train + 1)))
    assert all(word in validation for word in (f"={val}", "data.val_fraction", str(val + 1)))


def test_training_on_the_first_tokens_alone_leaves_the_files_and_validation_as_they_are(corpus_folder, text_data):
    store = prepared(text_data(corpus_folder))
    few = prepared(text_data(corpus_folder, train_tokens=100))
    assert few.folder == store.folder
    assert np.array_equal(few.train, store.train[:100])
    assert np.array_equal(few.val, store.val)
    read = {tuple(row) for row in training_windows(few.train, 9, seed=0, first=0, count=22).tolist()}
    assert read == {tuple(store.train[start : start + 10].tolist()) for start in range(0, 99, 9)}
    few.check(seq_len=9, sequences_per_step=11)
    assert "has 100; use a larger data.train_tokens, fewer" in refusal(few.check, seq_len=9, sequences_per_step=12)


def test_bytes_of_validation_are_those_of_the_text_where_the_tokenizer_drops_some(corpus_folder, text_data, tmp_path):
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"])}
    lossy = Tokenizer(models.BPE(letters, []))
    lossy.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "")])
    lossy.save(str(tmp_path / "tokenizer.json"))
    given = TokenizerConfig("hf", path=str(tmp_path / "tokenizer.json"))
    for tokenizer in (BYTE, given):
        store = prepared(text_data(corpus_folder, val_fraction=0.1), tokenizer)
        assert store.val_bytes[store.val].sum() == pytest.approx(store.manifest["splits"]["val"]["bytes"])


def test_unigram_entropy_is_that_of_the_frequencies(monkeypatch):
    monkeypatch.setattr("est_cli.data.tokens._COUNTED_AT_ONCE", 3)
    tokens = np.array([0, 0, 0, 0, 1, 1, 2, 3], dtype=np.uint16)
    assert unigram_entropy(tokens, 10) == pytest.approx(1.75 * math.log(2))
    assert count_tokens(tokens, 5).tolist() == [4, 2, 1, 1, 0]


def test_an_inspection_is_plain_and_says_what_is_there(corpus_folder, text_data):
    store = prepared(text_data(corpus_folder), PIECES)
    report = json.loads(json.dumps(inspect(store, n_samples=2, sample_tokens=20)))
    train = report["splits"]["train"]
    assert (train["tokens"], report["tokenizer"]["vocab_size"]) == (len(store.train), 400)
    assert train["bytes_per_token"] == pytest.approx(train["bytes"] / train["tokens"])
    assert train["unigram_entropy_bits"] == pytest.approx(train["unigram_entropy_nats"] / math.log(2))
    text = "".join(file.read_text() for file in sorted(corpus_folder.rglob("*.txt")))
    assert len(report["samples"]) == 2
    assert report["samples"][0] in text
