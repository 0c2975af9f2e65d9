"""data=hf: which files and rows are read, what is left out or broken, and what is said if the hub cannot be reached."""

import gzip
import json
import os
import shutil
import sys
import time

import numpy as np
import pytest
import zstandard

from est_cli.config import DataConfig, TokenizerConfig
from est_cli.data.dataset_files import split_of
from est_cli.data.hf_corpus import HFCorpus, StreamedCorpus
from est_cli.data.tokens import prepare
from est_cli.errors import UserError

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {i}: é\nsecond line\n" * (1 + i % 3) for i in range(30)]


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


def write(file, texts, column="text"):
    dataset = datasets.Dataset.from_dict({column: texts, "number": list(range(len(texts)))})
    {".parquet": dataset.to_parquet, ".jsonl": dataset.to_json}[file.suffix](str(file))
    return file


def rows(corpus: HFCorpus) -> list[str]:
    return [corpus.read(i, 0, int(size)).decode() for i, size in enumerate(corpus.sizes)]


def test_a_text_file_is_one_document(tmp_path, hf):
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    assert rows(HFCorpus(hf(tmp_path / "a.txt"))) == ["".join(TEXTS)]


def test_arrow_files_and_saved_datasets_are_read(tmp_path, hf):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": TEXTS[:20]}),
            "test": datasets.Dataset.from_dict({"text": TEXTS[20:]}),
        }
    ).save_to_disk(tmp_path / "splits")
    assert rows(HFCorpus(hf(tmp_path / "saved"))) == TEXTS
    assert rows(HFCorpus(hf(str(tmp_path / "saved" / "*.arrow")))) == TEXTS
    assert rows(HFCorpus(hf(tmp_path / "splits", split="test"))) == TEXTS[20:]


def test_a_folder_has_the_splits_that_its_files_are_named_for(tmp_path, hf):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train-0.parquet", TEXTS[:20])
    write(folder / "validation-0.parquet", TEXTS[20:])
    corpus = HFCorpus(hf(folder, val_split="validation"))
    assert rows(corpus) == TEXTS
    assert corpus.given_val.tolist() == [False] * 20 + [True] * 10


def test_lists_and_globs_are_one_dataset(tmp_path, hf):
    files = [write(tmp_path / f"{i}.jsonl", TEXTS[10 * i : 10 * i + 10]) for i in range(3)]
    assert rows(HFCorpus(hf(tuple(map(str, files))))) == TEXTS
    assert rows(HFCorpus(hf(str(tmp_path / "*.jsonl")))) == TEXTS


def test_a_slice_of_a_split_is_that_slice(tmp_path, hf):
    file = write(tmp_path / "a.parquet", TEXTS)
    assert rows(HFCorpus(hf(file, split="train[5:10]"))) == TEXTS[5:10]
    assert rows(HFCorpus(hf(file, split="train[:50%]", val_split="train[50%:]"))) == TEXTS


def test_a_prepared_dataset_holds_every_row_and_skips_empty_ones(tmp_path, hf):
    file = write(tmp_path / "a.parquet", [*TEXTS, "", None], column="content")
    data = hf(file, column="content", val_fraction=0.2)
    store = prepare(data, TokenizerConfig("byte"), 512, lambda _: None, False)
    texts = store.tokenizer.decode(np.concatenate([store.train, store.val]).tolist())
    assert sorted(texts) == sorted("".join(TEXTS))
    assert (store.train == 256).sum() + (store.val == 256).sum() == 30
    assert store.manifest["source"]["column"] == "content"


def test_a_prepared_dataset_is_found_again_without_the_library(tmp_path, hf, monkeypatch):
    data = hf(write(tmp_path / "a.parquet", TEXTS))
    store = prepare(data, TokenizerConfig("byte"), 512, lambda _: None, False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare(data, TokenizerConfig("byte"), 512, lambda _: None, False).folder == store.folder


def refusal(data: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        rows(HFCorpus(data))
    return str(caught.value)


def test_an_unknown_column_lists_those_there_are(tmp_path, hf):
    file = write(tmp_path / "a.jsonl", TEXTS, column="content")
    said = refusal(hf(file, column="contents"))
    assert said.startswith("data.column=contents: must be one of content, number in ")
    assert said.endswith("a.jsonl; did you mean 'content'?")
    said = refusal(hf(file, column="number"))
    assert "a.jsonl, line 1: data.column=number must be text, and is a number" in said
    file = write(tmp_path / "a.parquet", TEXTS)
    assert "data.column=number: must be a column of text, and holds int64" in refusal(hf(file, column="number"))


@pytest.mark.parametrize("path", ["a.parquet", "folder/deep/er", "./a", "~/a", "a*.jsonl", ("a.jsonl", "b.jsonl")])
def test_a_missing_local_path_is_not_looked_for_on_the_hub(path, hf, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked for"))
    assert refusal(hf(path)).startswith("data.path=")


def test_a_list_with_a_missing_file_is_refused(tmp_path, hf):
    there = write(tmp_path / "a.jsonl", TEXTS)
    assert "there is no 'b.jsonl'" in refusal(hf((str(there), str(tmp_path / "b.jsonl"))))


def test_the_name_of_a_builder_does_not_read_the_current_folder(tmp_path, hf, monkeypatch):
    write(tmp_path / "a.jsonl", TEXTS)
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


pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROWS = [f"document {i}: é" for i in range(12)]


def lines(rows, **more) -> bytes:
    return b"".join(json.dumps({"text": row, **more}).encode() + b"\n" for row in rows)


@pytest.fixture
def local(tmp_path):
    """Writes files into a folder of their own, and names it, or a place in it, as data."""

    def make(files: dict[str, bytes], place: str = "", **options) -> DataConfig:
        for name, content in files.items():
            file = tmp_path / "set" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        path = os.path.join(tmp_path, "set", place)
        return DataConfig(kind="hf", path=path, cache_dir=str(tmp_path / "cache"), **options)

    return make


def read(data: DataConfig) -> tuple[list[str | bytes], list[str]]:
    """The rows, and what was told."""
    said: list[str] = []
    corpus = HFCorpus(data, said.append)
    return [corpus.read(i, 0, int(size)).decode() for i, size in enumerate(corpus.sizes)], said


def parquet(table) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    return out.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("files", "place"),
    [
        ({"a.jsonl": lines(ROWS[:6]), "b.parquet": parquet(pa.table({"text": ROWS[6:]}))}, ""),
        ({"more.jsonl": lines(ROWS[:6]), "train_part.jsonl": lines(ROWS[6:])}, ""),
        ({"a.jsonl": lines(ROWS[:6]), "b.jsonl": lines(ROWS[6:], meta={"k": 1})}, ""),
        ({"a.jsonl": lines(ROWS[:6], n=1), "b.jsonl": lines(ROWS[6:], n="one")}, ""),
        ({"part[1].jsonl": lines(ROWS)}, "part[1].jsonl"),
        ({"[x]/a.jsonl": lines(ROWS)}, "[x]"),
        ({"A.JSONL": lines(ROWS)}, ""),
        ({"a.jsonl.gz": gzip.compress(lines(ROWS))}, ""),
        ({"a.json": json.dumps([{"text": row} for row in ROWS], indent=1).encode()}, ""),
        ({"a.jsonl.zst": zstandard.compress(lines(ROWS))}, ""),
        ({"a.tsv": b"text\tn\n" + "".join(f'"{row}"\t1\n' for row in ROWS).encode()}, ""),
        ({"a.json": lines(ROWS)}, ""),
        ({"a.json": json.dumps({"text": ROWS}).encode()}, ""),
        ({"a.parquet": parquet(pa.table({"text": pa.array([], pa.string())})), "b.jsonl": lines(ROWS)}, ""),
        ({"a.jsonl": b"", "b.jsonl": lines(ROWS)}, ""),
        ({"a.parquet": parquet(pa.table({"text": pa.array(ROWS, pa.string_view())}))}, ""),
        ({"a.parquet": parquet(pa.table({"text": pa.array(ROWS, pa.large_string())}))}, ""),
        ({"a.parquet": parquet(pa.table({"text": pa.array(ROWS).dictionary_encode()}))}, ""),
        ({"a.csv": b"\xef\xbb\xbftext,n\n" + "".join(f'"{row}",1\n' for row in ROWS).encode()}, ""),
        (
            {"README.md": b"---\nconfigs:\n- config_name: default\n  data_files: x/*\n---\n", "x/a.jsonl": lines(ROWS)},
            "",
        ),
    ],
)
def test_every_row_is_read_once_and_in_order_streamed_or_not(local, files, place):
    data = local(files, place)
    assert read(data)[0] == ROWS
    assert list(StreamedCorpus(data).training_texts().one_pass()) == ROWS


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
    data = local({"a.jsonl": lines([*ROWS, "", None]), "test.jsonl": lines(["no"]), "notes.md": b"no"})
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
    data = local({"a.jsonl": lines(["one"] * 9), "test.jsonl": lines(["x"])})
    before, times = HFCorpus(data).fingerprint, os.stat(tmp_path / "set" / "a.jsonl")
    streamed = StreamedCorpus(data).fingerprint
    local({"test.jsonl": lines(["other"])})
    assert HFCorpus(data).fingerprint == before
    copy = shutil.copytree(tmp_path / "set", tmp_path / "copy")
    os.rename(copy / "a.jsonl", copy / "b.jsonl")
    assert HFCorpus(DataConfig(kind="hf", path=str(copy))).fingerprint == before
    local({"a.jsonl": lines(["two"] * 9)})
    os.utime(tmp_path / "set" / "a.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert HFCorpus(data).fingerprint != before
    assert StreamedCorpus(data).fingerprint != streamed
    assert read(data)[0] == ["two"] * 9


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_invalid_utf8_is_replaced_counted_and_told(local, name):
    texts = [row.encode() for row in ROWS]
    texts[7] += b" caf\xe9"
    arrays = pa.StringArray.from_buffers(len(texts), *pa.array(texts, pa.binary()).buffers()[1:])
    content = {
        "a.jsonl": b"".join(b'{"text": "' + text + b'"}\n' for text in texts),
        "a.csv": b"text\n" + b"".join(text + b"\n" for text in texts),
        "a.parquet": parquet(pa.table({"text": arrays})),
    }
    data, said = local({name: content[name]}), []
    store = prepare(data, TokenizerConfig("byte"), 512, said.append, False)
    assert "data: replaced 1 invalid UTF-8 sequences by U+FFFD" in said
    assert "caf\ufffd" in store.tokenizer.decode(np.concatenate([store.train, store.val]).tolist())
    assert "caf\ufffd" in list(StreamedCorpus(data, said.append).training_texts().one_pass())[7]
    assert "invalid UTF-8" in said[-1]


BROKEN = {
    "cut.jsonl": (lines(ROWS[:2]) + b'{"text": "cut\n' + lines(ROWS[2:]), "cut.jsonl, line 3: is no JSON ("),
    "number.jsonl": (lines([ROWS[0], 5, *ROWS[1:]]), "line 2: data.column=text must be text, and is a number"),
    "list.jsonl": (b"[1]\n" + lines(ROWS), "line 1: must be an object with a key 'text', and is a list"),
    "fields.csv": ("text,n\na,1,2\n" + "".join(f"{row},1\n" for row in ROWS), "line 2: has 3 fields, and the first"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_one_message_with_file_and_line_or_is_left_out(local, name):
    content, message = BROKEN[name]
    content = content if isinstance(content, bytes) else content.encode()
    for open_corpus in (read, lambda data: list(StreamedCorpus(data).training_texts().one_pass())):
        with pytest.raises(UserError) as caught:
            open_corpus(local({name: content}, name))
        assert message in str(caught.value) and "data.on_broken=skip" in str(caught.value)
    rows, said = read(local({name: content}, name, on_broken="skip"))
    assert rows == ROWS
    assert "left out 1 broken rows, such as" in said[-1] and message in said[-1]


REFUSED = [
    ({"a.parquet": b"no"}, "", {}, "a.parquet: cannot be read as parquet ("),
    ({"a.jsonl.gz": b"no"}, "", {}, "a.jsonl.gz: cannot be read as jsonl ("),
    ({"a.jsonl.gz": gzip.compress(lines(ROWS))[:-20]}, "", {}, "a.jsonl.gz: cannot be read as jsonl ("),
    ({"a.csv": b"A whole document without any header\n" * 3}, "", {}, "one of A whole document without any header in"),
    ({"a.jsonl": lines(ROWS)}, "", {"split": "test"}, "data.split=test: must be a split of the files"),
    ({"a.jsonl": lines(ROWS)}, "", {"val_split": "test"}, "data.val_split=test: must be a split of the files"),
    ({"c.xyz": b"x"}, "c.xyz", {}, "must be parquet, jsonl"),
    ({"a.jsonl": lines(ROWS)}, "", {"split": "train[5"}, "data.split=train[5: must be a split, such as"),
    ({"a.jsonl": lines(ROWS)}, "", {"name": "en"}, "data.name=en: must be null"),
    ({"a.jsonl": lines(ROWS), "b.jsonl": b'{"txt": "x"}\n'}, "", {}, "must be one of txt in"),
    ({"a.xyz": b"x"}, "", {}, "the folder holds no parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "place", "options", "message"), REFUSED)
def test_what_cannot_be_read_is_said_with_a_reason(local, files, place, options, message):
    with pytest.raises(UserError) as caught:
        read(local(files, place, **options))
    assert message in str(caught.value)
    assert "()" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_stream_goes_on_from_any_row_of_any_file(local):
    data = local(
        {
            "a.jsonl": lines(ROWS[:3]),
            "b.parquet": parquet(pa.table({"text": ROWS[3:7]})),
            "c.csv": ("text\n" + "\n".join(ROWS[7:])).encode(),
        }
    )
    for taken in range(1, len(ROWS)):
        stream = StreamedCorpus(data).training_texts()
        stream.next(taken)
        again = StreamedCorpus(data).training_texts()
        again.go_to(json.loads(json.dumps(stream.position())))
        assert list(again.one_pass()) == ROWS[taken:]


def test_rows_that_nobody_used_for_a_month_are_deleted_when_others_are_written(local, tmp_path):
    read(local({"a.jsonl": lines(ROWS)}, "a.jsonl"))
    (old,) = (tmp_path / "cache").glob("rows-*.arrow")
    (tmp_path / "cache" / "rows-0.arrow").write_bytes(b"")
    month_ago = time.time() - 31 * 24 * 3600
    for name in (old.name, "rows-0.arrow"):
        os.utime(tmp_path / "cache" / name, (month_ago, month_ago))
    assert read(local({}, "a.jsonl"))[0] == ROWS, "is a use"
    read(local({"b.jsonl": lines(ROWS[1:])}, "b.jsonl"))
    left = set((tmp_path / "cache").glob("rows-*.arrow"))
    assert old in left and len(left) == 2
