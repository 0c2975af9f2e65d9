"""data=hf on local files of every format, and what is said where the hub or a column is missing."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from est_cli.config import DataConfig, TokenizerConfig
from est_cli.data.hf_corpus import HFCorpus
from est_cli.data.tokens import prepare
from est_cli.errors import UserError

datasets = pytest.importorskip("datasets")

ROWS = [f"document {i}: é\nsecond line\n" * (1 + i % 3) for i in range(30)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def hf(tmp_path):
    def make(path, **options) -> DataConfig:
        return DataConfig(
            kind="hf", path=path if isinstance(path, tuple) else str(path), cache_dir=str(tmp_path / "cache"), **options
        )

    return make


def rows(corpus: HFCorpus) -> list[str]:
    return [corpus.read(i, 0, int(size)).decode() for i, size in enumerate(corpus.sizes)]


def write(file, texts, column="text"):
    dataset = datasets.Dataset.from_dict({column: texts, "number": list(range(len(texts)))})
    {
        ".parquet": dataset.to_parquet,
        ".jsonl": dataset.to_json,
        ".csv": dataset.to_csv,
        ".tsv": lambda name: dataset.to_csv(name, sep="\t"),
        ".gz": lambda name: dataset.to_json(name, compression="gzip"),
        ".zst": lambda name: Path(name).write_bytes(zstandard.compress(b"".join(map(_line, dataset)))),
    }[file.suffix](str(file))
    return file


def _line(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.tsv", "a.jsonl.gz", "a.jsonl.zst"])
def test_local_files_of_each_format_give_their_rows(name, tmp_path, hf):
    assert rows(HFCorpus(hf(write(tmp_path / name, ROWS)))) == ROWS


def test_a_text_file_is_one_document(tmp_path, hf):
    (tmp_path / "a.txt").write_text("".join(ROWS))
    assert rows(HFCorpus(hf(tmp_path / "a.txt"))) == ["".join(ROWS)]


def test_arrow_files_and_saved_datasets_are_read(tmp_path, hf):
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": ROWS[:20]}),
            "test": datasets.Dataset.from_dict({"text": ROWS[20:]}),
        }
    ).save_to_disk(tmp_path / "splits")
    assert rows(HFCorpus(hf(tmp_path / "saved"))) == ROWS
    assert rows(HFCorpus(hf(str(tmp_path / "saved" / "*.arrow")))) == ROWS
    assert rows(HFCorpus(hf(tmp_path / "splits", split="test"))) == ROWS[20:]


def test_a_folder_has_the_splits_that_its_files_are_named_for(tmp_path, hf):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train-0.parquet", ROWS[:20])
    write(folder / "validation-0.parquet", ROWS[20:])
    corpus = HFCorpus(hf(folder, val_split="validation"))
    assert rows(corpus) == ROWS
    assert corpus.given_val.tolist() == [False] * 20 + [True] * 10


def test_lists_and_globs_are_one_dataset(tmp_path, hf):
    files = [write(tmp_path / f"{i}.jsonl", ROWS[10 * i : 10 * i + 10]) for i in range(3)]
    assert rows(HFCorpus(hf(tuple(map(str, files))))) == ROWS
    assert rows(HFCorpus(hf(str(tmp_path / "*.jsonl")))) == ROWS


def test_a_slice_of_a_split_is_that_slice(tmp_path, hf):
    file = write(tmp_path / "a.parquet", ROWS)
    assert rows(HFCorpus(hf(file, split="train[5:10]"))) == ROWS[5:10]
    assert rows(HFCorpus(hf(file, split="train[:50%]", val_split="train[50%:]"))) == ROWS


def test_a_prepared_dataset_holds_every_row_and_skips_empty_ones(tmp_path, hf):
    file = write(tmp_path / "a.parquet", [*ROWS, "", None], column="content")
    data = hf(file, column="content", val_fraction=0.2)
    store = prepare(data, TokenizerConfig("byte"), 512, lambda _: None, False)
    texts = store.tokenizer.decode(np.concatenate([store.train, store.val]).tolist())
    assert sorted(texts) == sorted("".join(ROWS))
    assert (store.train == 256).sum() + (store.val == 256).sum() == 30
    assert store.manifest["source"]["column"] == "content"


def test_a_prepared_dataset_is_found_again_without_the_library(tmp_path, hf, monkeypatch):
    data = hf(write(tmp_path / "a.parquet", ROWS))
    store = prepare(data, TokenizerConfig("byte"), 512, lambda _: None, False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare(data, TokenizerConfig("byte"), 512, lambda _: None, False).folder == store.folder
    with pytest.raises(UserError, match="needs the `datasets` library"):
        prepare(hf("someone/some-corpus"), TokenizerConfig("byte"), 512, lambda _: None, False)


def refusal(data: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        rows(HFCorpus(data))
    return str(caught.value)


def test_an_unknown_column_lists_those_there_are(tmp_path, hf):
    file = write(tmp_path / "a.jsonl", ROWS, column="content")
    said = refusal(hf(file, column="contents"))
    assert said.startswith("data.column=contents: must be one of content, number in ")
    assert said.endswith("a.jsonl; did you mean 'content'?")
    said = refusal(hf(file, column="number"))
    assert "a.jsonl, line 1: data.column=number must be text, and is a number" in said
    file = write(tmp_path / "a.parquet", ROWS)
    assert "data.column=number: must be a column of text, and holds int64" in refusal(hf(file, column="number"))


def test_an_unknown_split_names_the_key_and_the_splits(tmp_path, hf):
    said = refusal(hf(write(tmp_path / "a.jsonl", ROWS), split="valid"))
    assert said.startswith("data.split=valid:")
    assert "'train'" in said
    assert "data.val_split=test" in refusal(hf(tmp_path / "a.jsonl", val_split="test"))


@pytest.mark.parametrize("path", ["a.parquet", "folder/deep/er", "./a", "~/a", "a*.jsonl", ("a.jsonl", "b.jsonl")])
def test_a_missing_local_path_is_not_looked_for_on_the_hub(path, hf, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked for"))
    assert refusal(hf(path)).startswith("data.path=")


def test_a_list_with_a_missing_file_is_refused(tmp_path, hf):
    there = write(tmp_path / "a.jsonl", ROWS)
    assert "there is no 'b.jsonl'" in refusal(hf((str(there), str(tmp_path / "b.jsonl"))))


def test_files_that_are_no_datasets_are_refused(tmp_path, hf):
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text')
    (tmp_path / "c.xyz").write_text("what")
    (tmp_path / "empty").mkdir()
    assert "a.parquet: cannot be read as parquet" in refusal(hf(tmp_path / "a.parquet"))
    assert "b.jsonl, line 2: is no JSON" in refusal(hf(tmp_path / "b.jsonl"))
    assert "must be parquet, jsonl" in refusal(hf(tmp_path / "c.xyz"))
    assert "holds no parquet" in refusal(hf(tmp_path / "empty"))


def test_the_name_of_a_builder_does_not_read_the_current_folder(tmp_path, hf, monkeypatch):
    write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert "data.path=json: must be" in refusal(hf("json"))


def test_an_unreachable_hub_is_told_at_once_with_what_to_place_where(hf, monkeypatch):
    monkeypatch.setattr("est_cli.data.hub.answers", lambda: False)
    start = time.perf_counter()
    said = refusal(hf(("someone/some-corpus",)))
    assert time.perf_counter() - start < 5
    for words in (
        "data.path=someone/some-corpus",
        "hf download someone/some-corpus",
        "data.path=FOLDER",
        "parquet",
        "column 'text'",
        "could not be reached",
    ):
        assert words in said
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_row_longer_than_a_piece_keeps_every_character(tmp_path, hf):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "é value " * 300_000}))
    store = prepare(hf(file), TokenizerConfig("byte"), 512, lambda _: None, False)
    tokens = np.concatenate([store.train[:-1], store.val[:-1]])
    assert tokens.astype(np.uint8).tobytes().decode() == "é value " * 300_000
