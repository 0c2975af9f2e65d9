"""A run keeps its tokenizer and notices when its text has changed: its ids keep their meaning."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny_corpora import BYTE, PIECES, prepared, prose

from est_cli.data.run_data import RECORD, RunData, keep_data
from est_cli.data.tokens import open_store, stored
from est_cli.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(prose(30, seed=number))
    return folder


@pytest.fixture
def begun(tmp_path, corpus, text_data):
    """The folder of a run that has begun on `corpus`, its data config and its token files."""
    data = text_data(corpus, val_fraction=0.2)
    store = prepared(data, PIECES)
    folder = tmp_path / "run"
    folder.mkdir()
    keep_data(folder, store, begins=True)
    return folder, data, store


def go_on(folder, data, say=lambda line: None, tokenizer=PIECES):
    run = RunData(folder, tokenizer.kind)
    return open_store(data, tokenizer, 512, say, False, run, lambda text: run.check(text, data, say))


MORE = "qxz " * 2000
CHANGES = [
    ("more.txt", MORE, "12 documents, now 13; "),
    ("3.txt", None, "12 documents, now 11; "),
    ("3.txt", prose(30, seed=3).swapcase(), "with other content"),
]


@pytest.mark.parametrize("name, text, said", CHANGES, ids=["added", "removed", "edited"])
def test_a_changed_text_is_refused_and_taken_with_the_runs_tokenizer_when_told_so(begun, corpus, name, text, said):
    folder, data, store = begun
    if text is None:
        (corpus / name).unlink()
    else:
        (corpus / name).write_text(text)
    with pytest.raises(UserError, match=f"^data.path={corpus}: the text has changed .*{said}.* data.on_change=accept"):
        go_on(folder, data)
    lines = []
    new = go_on(folder, replace(data, on_change="accept"), lines.append)
    assert any(said in line for line in lines)
    assert new.tokenizer.definition == store.tokenizer.definition
    assert prepared(data, PIECES).fingerprint != new.fingerprint
    keep_data(folder, new, begins=False)
    assert RunData(folder, "sentencepiece").record["earlier"][0]["fingerprint"] == store.text.fingerprint
    assert go_on(folder, data).fingerprint == new.fingerprint


def test_an_unchanged_text_continues_with_the_files_it_began_with_also_from_another_place(begun, corpus, said):
    folder, data, store = begun
    assert go_on(folder, data).folder == store.folder
    moved = replace(data, path=str(corpus.rename(corpus.with_name("moved"))))
    assert go_on(folder, moved, said.append).folder == store.folder
    assert not any("the text has changed" in line for line in said)


def test_files_of_another_training_of_the_tokenizer_are_not_taken_for_the_runs(begun, llama_model):
    folder, data, store = begun
    (store.folder / "tokenizer.model").write_bytes(llama_model)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    manifest["files"]["tokenizer.model"] = len(llama_model)
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    again = go_on(folder, data)
    assert again.folder != store.folder
    assert (again.val == store.val).all()
    assert stored(data, RunData(folder, "sentencepiece")) is None


def test_the_runs_files_are_read_from_the_cache_when_its_text_is_gone(begun, corpus):
    folder, data, store = begun
    shutil.rmtree(corpus)
    assert (stored(data, RunData(folder, "sentencepiece")).val == store.val).all()


def test_the_tokenizer_is_written_once(begun, text_data, corpus):
    folder, data, store = begun
    (corpus / "more.txt").write_text(MORE)
    other = prepared(data, PIECES)
    assert other.tokenizer.definition != store.tokenizer.definition
    keep_data(folder, other, begins=False)
    assert (folder / "tokenizer" / "tokenizer.model").read_bytes() == store.tokenizer.proto


def test_another_tokenizer_in_the_runs_folder_is_refused(begun, llama_model):
    folder, data, _ = begun
    (folder / "tokenizer" / "tokenizer.model").write_bytes(llama_model)
    with pytest.raises(UserError, match="is not the tokenizer that this run trained with"):
        go_on(folder, data)


@pytest.mark.parametrize("tokenizer", [BYTE, PIECES], ids=["byte", "sentencepiece"])
def test_a_run_that_recorded_nothing_continues_and_says_so(begun, corpus, tokenizer):
    folder, data, store = begun
    (folder / RECORD).unlink()
    lines = []
    new = go_on(folder, data, lines.append, tokenizer)
    assert any(f"has no {RECORD}: whether its text has changed" in line for line in lines)
    assert tokenizer is BYTE or (new.val == store.val).all()


def test_a_damaged_record_is_named(begun):
    folder, data, _ = begun
    (folder / RECORD).write_text('{"text": 3}')
    with pytest.raises(UserError, match=f"{RECORD}: is damaged"):
        go_on(folder, data)
