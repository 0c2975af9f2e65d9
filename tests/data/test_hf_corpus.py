"""data=hf: which files and rows are read, what is left out or broken, and what is said if the hub cannot be reached."""

import gzip
import json
import os
import shutil
import sys
import time
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpora import documents, jsonl, prepared, refusal

from est_cli.config import DataConfig
from est_cli.data.dataset_files import split_of
from est_cli.data.hf_corpus import HFCorpus, StreamedCorpus

ROWS = [f"document {i}: é" for i in range(12)]
ZSTD = b"".join(pa.compress(jsonl(rows), "zstd", asbytes=True) for rows in (ROWS[:6], ROWS[6:]))


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def local(tmp_path, hf_data):
    """Writes files into a folder of their own, and names it, or a place in it, as data."""

    def make(files: dict[str, bytes], place: str = "", **options) -> DataConfig:
        for name, content in files.items():
            file = tmp_path / "set" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return hf_data(os.path.join(tmp_path, "set", place), **options)

    return make


def read(data: DataConfig) -> tuple[list[str], list[str]]:
    """The rows, and what was told."""
    said: list[str] = []
    corpus = HFCorpus(data, said.append)
    return [corpus.read(i, 0, int(size)).decode() for i, size in enumerate(corpus.sizes)], said


def streamed(data: DataConfig, say=print) -> list[str]:
    return list(StreamedCorpus(data, say).training_texts(()).one_pass())


def parquet(values=ROWS, **columns) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": values, **columns}), out)
    return out.getvalue().to_pybytes()


README = b"---\nconfigs:\n- config_name: default\n  data_files: x/*\n---\n"


@pytest.mark.parametrize(
    ("files", "place"),
    [
        ({"a.jsonl": jsonl(ROWS[:6]), "b.parquet": parquet(ROWS[6:])}, ""),
        ({"a.jsonl": jsonl(ROWS[:6]), "b.jsonl": jsonl(ROWS[6:])}, "*.jsonl"),
        ({"more.jsonl": jsonl(ROWS[:6]), "train_part.jsonl": jsonl(ROWS[6:])}, ""),
        ({"a.jsonl": jsonl(ROWS[:6]), "b.jsonl": jsonl(ROWS[6:], meta={"k": 1})}, ""),
        ({"a.jsonl": jsonl(ROWS[:6], n=1), "b.jsonl": jsonl(ROWS[6:], n="one")}, ""),
        ({"part[1].jsonl": jsonl(ROWS)}, "part[1].jsonl"),
        ({"[x]/a.jsonl": jsonl(ROWS)}, "[x]"),
        ({"A.JSONL": jsonl(ROWS)}, ""),
        ({"a.jsonl.gz": gzip.compress(jsonl(ROWS))}, ""),
        ({"a.json": json.dumps([{"text": row} for row in ROWS], indent=1).encode()}, ""),
        ({"a.jsonl.zst": ZSTD}, ""),
        ({"a.tsv": b"text\tn\n" + "".join(f'"{row}"\t1\n' for row in ROWS).encode()}, ""),
        ({"a.json": jsonl(ROWS)}, ""),
        ({"a.json": json.dumps({"text": ROWS}).encode()}, ""),
        ({"a.parquet": parquet(pa.array([], pa.string())), "b.jsonl": jsonl(ROWS)}, ""),
        ({"a.jsonl": b"", "b.jsonl": jsonl(ROWS)}, ""),
        ({"a.parquet": parquet(pa.array(ROWS, pa.string_view()))}, ""),
        ({"a.parquet": parquet(pa.array(ROWS, pa.large_string()))}, ""),
        ({"a.parquet": parquet(pa.array(ROWS).dictionary_encode())}, ""),
        ({"a.csv": b"\xef\xbb\xbftext,n\n" + "".join(f'"{row}",1\n' for row in ROWS).encode()}, ""),
        ({"README.md": README, "x/a.jsonl": jsonl(ROWS), "b.jsonl": jsonl(["no"])}, ""),
    ],
)
def test_every_row_is_read_once_and_in_order_streamed_or_not(local, files, place):
    data = local(files, place)
    assert read(data)[0] == streamed(data) == ROWS


def test_a_text_file_is_one_document(local):
    assert read(local({"a.txt": "\n".join(ROWS).encode()}))[0] == ["\n".join(ROWS)]


def test_a_list_is_one_dataset_of_files_that_must_all_exist(local, hf_data, tmp_path):
    local({"a.jsonl": jsonl(ROWS[:6]), "b.jsonl": jsonl(ROWS[6:])})
    paths = [str(tmp_path / "set" / name) for name in ("b.jsonl", "a.jsonl", "c.jsonl")]
    assert read(hf_data(tuple(paths[:2])))[0] == ROWS[6:] + ROWS[:6]
    assert "there is no 'c.jsonl'" in refusal(read, hf_data(tuple(paths)))


def test_arrow_files_and_saved_datasets_are_read(tmp_path, hf_data):
    train, test = (datasets.Dataset.from_dict({"text": rows}) for rows in (ROWS[:8], ROWS[8:]))
    train.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "splits")
    assert read(hf_data(tmp_path / "saved"))[0] == ROWS[:8]
    assert read(hf_data(tmp_path / "saved" / "*.arrow"))[0] == ROWS[:8]
    assert read(hf_data(tmp_path / "splits", split="test"))[0] == ROWS[8:]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "train[5:10]"}, ROWS[5:10]),
        ({"split": "train[:50%]", "val_split": "train[50%:]"}, ROWS),
        ({"split": "train+validation[-1:]"}, [*ROWS, "val 1"]),
        ({"val_split": "validation"}, [*ROWS, "val 0", "val 1"]),
    ],
)
def test_splits_and_their_slices_are_read_as_named(local, options, expected):
    data = local({"train-0.parquet": parquet(), "validation-0.parquet": parquet(["val 0", "val 1"])}, **options)
    assert read(data)[0] == expected
    given = HFCorpus(data).given_val
    n_val = 0 if given is None else int(given.sum())
    assert n_val == {"train[50%:]": 6, "validation": 2}.get(data.val_split, 0)
    assert not n_val or given[-n_val:].all()


def test_a_prepared_dataset_holds_every_row_skips_empty_ones_and_is_found_again_without_the_library(local, monkeypatch):
    data = local({"a.jsonl": jsonl([*ROWS, "", None], column="content")}, column="content", val_fraction=0.2)
    store = prepared(data)
    assert sorted(documents(store, store.train) + documents(store, store.val)) == sorted(ROWS)
    assert store.manifest["source"]["column"] == "content"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepared(data).folder == store.folder


def test_a_row_longer_than_a_piece_keeps_every_character(local):
    text = "é value " * 300_000
    store = prepared(local({"a.jsonl": jsonl([text])}))
    tokens = np.concatenate([store.train[:-1], store.val[:-1]])
    assert tokens.astype(np.uint8).tobytes().decode() == text


@pytest.mark.parametrize("path", ["a.parquet", "folder/deep/er", "./a", "~/a", "a*.jsonl", ("a.jsonl", "b.jsonl")])
def test_a_missing_local_path_is_not_looked_for_on_the_hub(path, hf_data, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked for"))
    assert refusal(read, hf_data(path)).startswith("data.path=")


def test_the_name_of_a_builder_does_not_read_the_current_folder(local, hf_data, tmp_path, monkeypatch):
    local({"a.jsonl": jsonl(ROWS)})
    monkeypatch.chdir(tmp_path / "set")
    assert "data.path=json: must be" in refusal(read, hf_data("json"))


def test_an_unreachable_hub_is_told_at_once_with_what_to_place_where(hf_data, monkeypatch):
    monkeypatch.setattr("est_cli.data.hub.answers", lambda: False)
    start = time.perf_counter()
    said = refusal(read, hf_data(("someone/some-corpus",)))
    assert time.perf_counter() - start < 5
    for words in ("data.path=someone/", "hf download someone/", "path=FOLDER", "parquet", "'text'", "not be reached"):
        assert words in said
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("more.jsonl", "train"),
        ("train_part.jsonl", "train"),
        ("latest-news.jsonl", "train"),
        ("test.jsonl", "test"),
        ("my-dev.jsonl.gz", "validation"),
        ("validation/0.parquet", "validation"),
        ("train/test_questions.jsonl", "train"),
        ("data/train_sft-00000-of-00002.parquet", "train_sft"),
        ("part-00000-of-00002.parquet", "train"),
    ],
)
def test_a_file_in_a_folder_belongs_to_the_split_that_its_path_names(name, split, tmp_path):
    assert split_of((tmp_path / name).relative_to(tmp_path)) == split


def test_what_is_left_out_is_told(local, tmp_path):
    data = local({"a.jsonl": jsonl([*ROWS, "", None]), "test.jsonl": jsonl(["no"]), "notes.md": b"no"})
    os.symlink(tmp_path / "nowhere", tmp_path / "set" / "b.jsonl")
    rows, said = read(data)
    assert [row for row in rows if row] == ROWS
    told = "\n".join(said)
    for words in ("(dead links), such as", "b.jsonl", "(of other formats), such as", "notes.md", "1 of split test"):
        assert words in told
    assert "reads 1 file (1 jsonl)" in told
    assert "2 of 14 rows hold no text" in told


def test_texts_that_other_readers_take_for_nothing_stay_texts(local):
    words = ["NA", "None", "null", "nan", "NaN", "", "1", "true", '"two\nlines"']
    found = read(local({"a.csv": ("text,n\n" + "".join(f"{word},1\n" for word in words)).encode()}))[0]
    assert found == [word.strip('"') for word in words]


def test_a_store_is_known_by_the_content_of_what_is_read_and_not_by_its_place(local, tmp_path):
    data = local({"a.jsonl": jsonl(["one"] * 9), "test.jsonl": jsonl(["x"])})
    before, times = HFCorpus(data).fingerprint, os.stat(tmp_path / "set" / "a.jsonl")
    sampled = StreamedCorpus(data).fingerprint
    local({"test.jsonl": jsonl(["other"])})
    assert HFCorpus(data).fingerprint == before
    copy = shutil.copytree(tmp_path / "set", tmp_path / "copy")
    os.rename(copy / "a.jsonl", copy / "b.jsonl")
    assert HFCorpus(replace(data, path=str(copy))).fingerprint == before
    local({"a.jsonl": jsonl(["two"] * 9)})
    os.utime(tmp_path / "set" / "a.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert HFCorpus(data).fingerprint != before
    assert StreamedCorpus(data).fingerprint != sampled
    assert read(data)[0] == ["two"] * 9


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_invalid_utf8_is_replaced_counted_and_told(local, name):
    texts = [row.encode() for row in ROWS]
    texts[6] += b" caf\xef\xbf\xbd that is U+FFFD itself"
    texts[7] += b" caf\xe9"
    arrays = pa.StringArray.from_buffers(len(texts), *pa.array(texts, pa.binary()).buffers()[1:])
    content = {
        "a.jsonl": b"".join(b'{"text": "' + text + b'"}\n' for text in texts),
        "a.csv": b"text\n" + b"".join(text + b"\n" for text in texts),
        "a.parquet": parquet(arrays),
    }
    data, said = local({name: content[name]}), []
    store = prepared(data, say=said.append)
    assert "data: replaced 1 invalid UTF-8 sequences by U+FFFD" in said
    assert "caf\ufffd" in store.tokenizer.decode(np.concatenate([store.train, store.val]).tolist())
    assert "caf\ufffd" in streamed(data, said.append)[7]
    assert "invalid UTF-8" in said[-1]


CSV = "".join(f"{row},1\n" for row in ROWS).encode()
BROKEN = [
    ("a.jsonl", jsonl(ROWS[:2]) + b'{"text": "cut\n' + jsonl(ROWS[2:]), "a.jsonl, line 3: is no JSON ("),
    ("a.jsonl", jsonl([ROWS[0], 5, *ROWS[1:]]), "line 2: data.column=text must be text, and is a number"),
    ("a.jsonl", b"[1]\n" + jsonl(ROWS), "line 1: must be an object with a key 'text', and is a list"),
    ("a.csv", b"text,n\na,1,2\n" + CSV, "line 2: has 3 fields, and the first"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_row_is_one_message_with_file_and_line_or_is_left_out(local, name, content, message):
    data = local({name: content}, name)
    for open_corpus in (read, streamed):
        said = refusal(open_corpus, data)
        assert message in said and "data.on_broken=skip" in said
    rows, said = read(replace(data, on_broken="skip"))
    assert rows == ROWS
    assert "left out 1 broken rows, such as" in said[-1] and message in said[-1]


REFUSED = [
    ({"a.parquet": b"no"}, "", {}, "a.parquet: cannot be read as parquet ("),
    ({"a.jsonl.gz": b"no"}, "", {}, "a.jsonl.gz: cannot be read as jsonl ("),
    ({"a.jsonl.gz": gzip.compress(jsonl(ROWS))[:-20]}, "", {}, "a.jsonl.gz: cannot be read as jsonl ("),
    ({"a.jsonl.zst": ZSTD[:-8]}, "", {}, "a.jsonl.zst: cannot be read as jsonl (Truncated"),
    ({"a.csv": b"A whole document without any header\n" * 3}, "", {}, "one of A whole document without any header in"),
    ({"a.jsonl": jsonl(ROWS)}, "", {"split": "test"}, "data.split=test: must be a split of the files"),
    ({"a.jsonl": jsonl(ROWS)}, "", {"val_split": "test"}, "data.val_split=test: must be a split of the files"),
    ({"c.xyz": b"x"}, "c.xyz", {}, "must be parquet, jsonl"),
    ({"a.jsonl": jsonl(ROWS)}, "", {"split": "train[5"}, "data.split=train[5: must be a split, such as"),
    ({"a.jsonl": jsonl(ROWS)}, "", {"name": "en"}, "data.name=en: must be null"),
    ({"a.jsonl": jsonl(ROWS), "b.jsonl": b'{"txt": "x"}\n'}, "", {}, "must be one of txt in"),
    ({"a.xyz": b"x"}, "", {}, "the folder holds no parquet"),
    ({"a.jsonl": jsonl(ROWS, n=1)}, "", {"column": "texts"}, "a.jsonl; did you mean 'text'?"),
    ({"a.jsonl": jsonl(ROWS, n=1)}, "", {"column": "texts"}, "data.column=texts: must be one of text, n in "),
    ({"a.jsonl": jsonl(ROWS, n=1)}, "", {"column": "n"}, ", line 1: data.column=n must be text, and is a number"),
    ({"a.parquet": parquet([1])}, "", {}, "data.column=text: must be a column of text, and holds int64"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "place", "options", "message"), REFUSED)
def test_what_cannot_be_read_is_said_with_a_reason(local, files, place, options, message):
    said = refusal(read, local(files, place, **options))
    assert message in said
    assert "()" not in said and len(said) < 400


def test_a_stream_goes_on_from_any_row_of_any_file(local):
    csv = "text\n" + "\n".join(ROWS[7:])
    data = local({"a.jsonl": jsonl(ROWS[:3]), "b.parquet": parquet(ROWS[3:7]), "c.csv": csv.encode()})
    for taken in range(1, len(ROWS)):
        stream = StreamedCorpus(data).training_texts(())
        stream.next(taken)
        again = StreamedCorpus(data).training_texts(())
        again.go_to(json.loads(json.dumps(stream.position())))
        assert list(again.one_pass()) == ROWS[taken:]


def test_rows_that_nobody_used_for_a_month_are_deleted_when_others_are_written(local, tmp_path):
    read(local({"a.jsonl": jsonl(ROWS)}, "a.jsonl"))
    (old,) = (tmp_path / "cache").glob("rows-*.arrow")
    (tmp_path / "cache" / "rows-0.arrow").write_bytes(b"")
    month_ago = time.time() - 31 * 24 * 3600
    for name in (old.name, "rows-0.arrow"):
        os.utime(tmp_path / "cache" / name, (month_ago, month_ago))
    assert read(local({}, "a.jsonl"))[0] == ROWS, "is a use"
    read(local({"b.jsonl": jsonl(ROWS[1:])}, "b.jsonl"))
    left = set((tmp_path / "cache").glob("rows-*.arrow"))
    assert old in left and len(left) == 2
