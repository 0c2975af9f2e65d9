"""Which files data=stdlib and data=text read, and what is told about the others."""

import os
import time
from pathlib import Path

import pytest

from est_cli.config import DataConfig
from est_cli.data.corpora import find_stdlib_files, find_text_files
from est_cli.data.splits import open_corpus
from est_cli.errors import UserError


def test_stdlib_is_source_without_tests_tables_and_installed_packages():
    files, source = find_stdlib_files()
    root = next(file for file in files if file.name == "argparse.py").parent
    names = [file.relative_to(root).as_posix() for file in files]
    assert {"argparse.py", "json/decoder.py", "logging/__init__.py"} <= set(names)
    assert source["kind"] == "stdlib"
    unwanted = (
        "test/",
        "idlelib/idle_test/",
        "site-packages/",
        "dist-packages/",
        "encodings/",
        "pydoc_data/",
        "_sysconfigdata",
    )
    assert not [name for name in names if name.startswith(unwanted) or "/tests/" in name]
    assert "html/entities.py" not in names
    assert sum(file.stat().st_size for file in files) > 5_000_000


def test_stdlib_is_fingerprinted_quickly_and_always_alike():
    data = DataConfig(kind="stdlib")
    first = open_corpus(data, print).fingerprint
    start = time.perf_counter()
    assert open_corpus(data, print).fingerprint == first
    assert time.perf_counter() - start < 1.0


def test_an_interpreter_without_source_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="data=stdlib"):
        find_stdlib_files()


def test_a_folder_is_read_recursively_in_order_without_hidden_files(corpus_folder, tmp_path, said):
    (tmp_path / "link").symlink_to(corpus_folder)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.txt").write_text("no")
    (tmp_path / ".b.txt").write_text("no")
    files = find_text_files(str(tmp_path), said.append)
    assert len(files) == 40
    assert files == sorted(files, key=lambda file: (file.parent, file.name))
    assert said == []


def test_linked_folders_that_go_in_circles_end(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(find_text_files(str(tmp_path), print)) == 1


def test_dead_links_empty_files_and_binaries_in_a_folder_are_skipped_and_told(tmp_path, said):
    (tmp_path / "good.txt").write_text("text with one \0 and é\n")
    (tmp_path / "dead.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", os.fsencode(tmp_path) + b"/\xff.txt")
    assert [file.name for file in find_text_files(str(tmp_path), said.append)] == ["good.txt"]
    told = "\n".join(said).encode("utf-8").decode()
    for words in (
        "2 files (dead links), such as",
        "1 file (empty)",
        "(binary)",
        "(special files)",
        "dead.txt",
        "image.png",
    ):
        assert words in told


def test_a_file_named_by_itself_is_read_whatever_it_holds(tmp_path, said):
    (tmp_path / "zeros").write_bytes(bytes(100))
    assert len(find_text_files(str(tmp_path / "zeros"), said.append)) == 1


def test_lists_and_globs_name_each_file_once(corpus_folder):
    paths = (str(corpus_folder / "**" / "0*.txt"), str(corpus_folder / "00.txt"))
    assert len(find_text_files(paths, print)) == 10


def test_paths_are_relative_to_the_current_folder_and_know_home(corpus_folder, monkeypatch):
    monkeypatch.chdir(corpus_folder)
    monkeypatch.setenv("HOME", str(corpus_folder / "sub"))
    assert find_text_files("00.txt", print) == [Path("00.txt")]
    assert find_text_files("~/01.txt", print) == [corpus_folder / "sub" / "01.txt"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("corpus/sud/00.txt", ["data.path=corpus/sud/00.txt", "did you mean 'sub'?"]),
        ("corpsu", ["data.path=corpsu", "did you mean 'corpus'?"]),
        ("corpus/*.md", ["data.path=corpus/*.md", "no file matches"]),
        ("~nobody-here/x", ["data.path=~nobody-here/x"]),
        ("a" * 5000, ["data.path=aaa"]),
        ("a\0b", ["data.path=a"]),
        ("", ["data.path: is missing"]),
        (None, ["data.path: is missing"]),
        ((), ["data.path: is missing"]),
    ],
)
def test_a_missing_path_is_named_with_the_nearest_that_exists(path, words, tmp_path, monkeypatch):
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_text_files(path, print)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("content", [None, ""])
def test_no_text_at_all_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(UserError, match="holds no text"):
        find_text_files(str(tmp_path), lambda _: None)


def test_the_fingerprint_follows_content_and_not_place(tmp_path):
    def fingerprint(folder: str, text: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_text(text)
        return open_corpus(DataConfig(kind="text", path=str(tmp_path / folder)), print).fingerprint

    assert fingerprint("one", "text") == fingerprint("two", "text")
    assert fingerprint("one", "text") != fingerprint("one", "texts")


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("0123456789")
    corpus = open_corpus(DataConfig(kind="text", path=str(file)), print)
    file.write_text("012")
    with pytest.raises(UserError, match="shorter"):
        corpus.read(0, 0, 10)
