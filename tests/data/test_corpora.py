"""Which files data=stdlib, packages and text read, what is said about the others, and how packages are split."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_corpora import PIECES, Documents, prepared, prose

from est_cli.config import DataConfig
from est_cli.data.corpora import find_stdlib_files, find_text_files, join_near_copies, site_packages
from est_cli.data.splits import open_corpus, split_corpus
from est_cli.data.tokens import inspect
from est_cli.errors import UserError


def test_stdlib_is_source_without_tests_tables_and_installed_packages():
    files, source = find_stdlib_files()
    root = next(file for file in files if file.name == "argparse.py").parent
    names = [file.relative_to(root).as_posix() for file in files]
    assert {"argparse.py", "json/decoder.py", "logging/__init__.py"} <= set(names)
    assert source["kind"] == "stdlib"
    unwanted = "test idlelib/idle_test site-packages dist-packages encodings pydoc_data _sysconfigdata html/entities.py"
    assert not [name for name in names if name.startswith(tuple(unwanted.split())) or "/tests/" in name]
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


def test_a_folder_is_read_recursively_in_order_without_hidden_files_and_circles(corpus_folder, tmp_path, said):
    (tmp_path / "link").symlink_to(corpus_folder)
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / ".hidden").mkdir()
    for hidden in (".hidden/a.txt", ".b.txt"):
        (tmp_path / hidden).write_text("no")
    files = find_text_files(str(tmp_path), said.append)
    assert len(files) == 40
    assert files == sorted(files, key=lambda file: (file.parent, file.name))
    assert said == []


def test_dead_links_empty_files_and_binaries_in_a_folder_are_skipped_and_told(tmp_path, said):
    (tmp_path / "good.txt").write_text("text with one \0 and é\n")
    (tmp_path / "dead.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", os.fsencode(tmp_path) + b"/\xff.txt")
    assert [file.name for file in find_text_files(str(tmp_path), said.append)] == ["good.txt"]
    told = "\n".join(said).encode("utf-8").decode()
    for words in ("2 files (dead links)", "1 file (empty)", "(binary)", "(special files)", "dead.txt", "image"):
        assert words in told
    assert len(find_text_files(str(tmp_path / "image.png"), said.append)) == 1, "a file that is named itself is read"


def test_lists_and_globs_name_each_file_once_relative_to_the_current_folder_and_home(corpus_folder, monkeypatch):
    paths = (str(corpus_folder / "**" / "0*.txt"), str(corpus_folder / "00.txt"))
    assert len(find_text_files(paths, print)) == 10
    monkeypatch.chdir(corpus_folder)
    monkeypatch.setenv("HOME", str(corpus_folder / "sub"))
    assert find_text_files(("00.txt", "~/01.txt"), print) == [Path("00.txt"), corpus_folder / "sub" / "01.txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("corpus/sud/00.txt", "data.path=corpus/sud/00.txt: .*did you mean 'sub'?"),
        ("corpsu", "data.path=corpsu: .*did you mean 'corpus'?"),
        ("corpus/*.md", r"data.path=corpus/\*.md: no file matches"),
        ("corpus", "data.path=corpus: holds no text"),
        ("void", "data.path=void: holds no text"),
        ("~nobody-here/x", "data.path=~nobody-here/x: "),
        ("a" * 5000, "data.path=aaa"),
        ("a\0b", "data.path=a"),
        *((nothing, "data.path: is missing") for nothing in ("", None, ())),
    ],
)
def test_a_missing_path_is_named_with_the_nearest_that_exists(path, message, tmp_path, monkeypatch):
    for folder in ("void", "corpus/sub"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "corpus" / "sub" / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{message}"):
        find_text_files(path, lambda _: None)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("0123456789")
    corpus = open_corpus(DataConfig(kind="text", path=str(file)), print)
    file.write_text("012")
    with pytest.raises(UserError, match="shorter"):
        corpus.read(0, 0, 10)


DATA = DataConfig(kind="packages", val_fraction=0.3)


def source(seed: int, n_lines: int = 20) -> str:
    """Lines that no other seed has."""
    return "".join(f"value_{seed}_{i} = {line!r}\n" for i, line in enumerate(prose(n_lines, seed).splitlines()))


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A site-packages folder of twenty packages with two files each; returns what writes a file into it."""
    root = tmp_path / "site-packages"
    monkeypatch.setattr("est_cli.data.corpora.site_packages", lambda: [root])

    def write(place: str, text: str | bytes) -> None:
        file = root / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)

    for i in range(20):
        write(f"package{i:02}/__init__.py", source(2 * i))
        write(f"package{i:02}/inner/module.py", source(2 * i + 1))
    return write


def texts(corpus) -> list[str]:
    return [corpus.read(i, 0, int(size)).decode() for i, size in enumerate(corpus.sizes)]


def packages_of(split) -> set[str]:
    return set(split.corpus.packages[split.documents].tolist())


def test_the_running_environment_is_found():
    assert any(root.joinpath("numpy/__init__.py").samefile(np.__file__) for root in site_packages())


def test_source_is_read_also_of_single_modules_and_of_folders_named_like_other_packages(environment):
    more = ["single.py", "package00/setuptools/a.py", "package00/testing/a.py", "package00/nodes.py"]
    written = [f'"""Nodes generated by the parser."""\n{source(100 + i)}' for i in range(len(more))]
    for place, text in zip(more, written, strict=True):
        environment(place, text)
    corpus = open_corpus(DATA, print)
    assert set(corpus.packages) == {f"package{i:02}" for i in range(20)} | {"single"}
    assert sorted(texts(corpus)) == sorted([*map(source, range(40)), *written])


def test_what_is_no_package_of_its_own_is_left_out(environment):
    before = open_corpus(DATA, print)
    top = "est_cli/train pip/main setuptools/dist pkg_resources/__init__ _virtualenv __editable___est_cli_finder"
    inside = "tests/test_a _vendor/six third_party/six __pycache__/a"
    places = [*top.split(), "_editable_impl_est_cli", *(f"package00/{place}" for place in inside.split())]
    for i, place in enumerate([*(f"{place}.py" for place in places), "package00-1.dist-info/a.py", "package00/a.txt"]):
        environment(place, source(100 + i))
    assert open_corpus(DATA, print).files == before.files


def test_copies_generated_files_and_what_is_no_text_are_left_out_and_counted(environment, said):
    generated = "# -*- coding: utf-8 -*-\n# Generated by the compiler.  DO NOT EDIT!\n" + source(9)
    odd = {"latin.py": b"\xe9 = 1\n", "zeros.py": b"\0" * 100, "empty.py": b"", "proto_pb2.py": generated}
    for place, text in {"again.py": source(0), "copy.py": source(0), **odd}.items():
        environment(f"another/{place}", text)
    corpus = open_corpus(DATA, said.append)
    assert corpus.source["left_out"] == {"empty or binary": 2, "exact copies": 2, "generated": 1, "not UTF-8": 1}
    assert "2 exact copies" in said[0]
    assert len(np.unique(corpus.keys)) == len(corpus.files) == 40
    assert corpus.packages[texts(corpus).index(source(0))] == "another"  # the first in order


def test_the_fingerprint_follows_content_and_packages_and_not_the_place(environment, tmp_path, monkeypatch):
    first = open_corpus(DATA, print)
    moved = tmp_path / "elsewhere"
    (tmp_path / "site-packages").rename(moved)
    monkeypatch.setattr("est_cli.data.corpora.site_packages", lambda: [moved])
    assert open_corpus(DATA, print).fingerprint == first.fingerprint
    (moved / "package00").rename(moved / "renamed")
    renamed = open_corpus(DATA, print).fingerprint
    (moved / "renamed" / "__init__.py").write_text(source(100))
    assert len({first.fingerprint, renamed, open_corpus(DATA, print).fingerprint}) == 3


def test_packages_lie_mixed_each_on_one_side_and_none_makes_up_validation(environment):
    environment("large/a.py", source(100, 600))
    corpus = open_corpus(DATA, print)
    assert len(set(corpus.packages[:10])) > 5
    train, val = split_corpus(corpus, 0.3)
    assert not packages_of(train) & packages_of(val)
    assert packages_of(train) | packages_of(val) == set(corpus.packages)
    assert len(packages_of(val)) >= 4
    assert "large" not in packages_of(val)
    assert val.n_bytes / corpus.sizes.sum() == pytest.approx(0.3, abs=0.05)


def test_packages_that_share_text_stay_together(environment):
    original = source(100, 400)
    for i in range(20):
        environment(f"package{i:02}/fork.py", original.replace(f"value_100_{i}", "changed"))
    environment("other/a.py", source(101, 400))
    files = open_corpus(DATA, print)
    first = join_near_copies(zip(files.packages.tolist(), files.files, strict=True))
    assert {first[f"package{i:02}"] for i in range(20)} == {"package00"}
    assert first["other"] == "other"
    assert len(np.unique(files.groups)) == 2


def test_packages_with_a_common_phrase_do_not_stay_together(environment):
    phrases = "".join(f"raise ValueError('a phrase that many small packages use, {i}')\n" for i in range(30))
    for i in range(10):
        environment(f"small{i}/a.py", phrases + f"a = {i}\n")
    environment("short/a.py", "a = 100\n")
    assert len(np.unique(open_corpus(DATA, print).groups)) == 31


@pytest.mark.parametrize(
    ("sizes", "group_size", "fraction", "expected"),
    [([120] * 100, 5, 0.2, {0, 1, 2, 3}), ([1000, *[300] * 60], 1, 0.1, {1, 2, 3, 4, 5, 6})],
    ids=["whole, by their hash", "none is more than a quarter of validation"],
)
def test_groups_are_drawn(sizes, group_size, fraction, expected):
    groups = np.arange(len(sizes), dtype=np.uint64) // np.uint64(group_size)
    documents = [f"{i:04} ".encode() * (size // 5) for i, size in enumerate(sizes)]
    train, val = split_corpus(Documents(*documents, groups=groups), fraction)
    assert not set(groups[train.documents]) & set(groups[val.documents])
    assert set(groups[val.documents]) == expected


def test_too_few_packages_for_a_split_are_refused(environment):
    with pytest.raises(UserError, match=r"data\.val_fraction=0\.01: .*use a larger fraction"):
        split_corpus(open_corpus(DATA, print), 0.01)


@pytest.mark.parametrize("text", [None, ""])
def test_an_environment_without_source_is_told(text, tmp_path, monkeypatch):
    monkeypatch.setattr("est_cli.data.corpora.site_packages", lambda: [tmp_path])
    if text is not None:
        (tmp_path / "empty.py").write_text(text)
    with pytest.raises(UserError, match=r"data=packages: .*use data=stdlib"):
        open_corpus(DATA, print)


def test_the_corpus_is_prepared_and_shows_its_packages(environment, tmp_path):
    data = replace(DATA, cache_dir=str(tmp_path / "cache"))
    store = prepared(data, PIECES)
    report = json.loads(json.dumps(inspect(store)))
    assert store.folder.name.startswith("packages-")
    assert sum(map(len, report["packages"].values())) == report["source"]["packages"] == 20
    for name, split in report["splits"].items():
        assert sum(report["packages"][name].values()) == split["bytes"]
    assert prepared(data, PIECES).folder == store.folder
