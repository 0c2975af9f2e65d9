"""The split by document, and the text that comes out of it."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpora import Documents, texts

from est_cli.data import splits
from est_cli.data.splits import Split, split_corpus
from est_cli.errors import UserError


def test_every_document_is_on_one_side_and_validation_gets_its_share():
    corpus = Documents(*(b"%d " % i * (20 + i % 7) for i in range(300)))
    train, val = split_corpus(corpus, 0.1)
    assert sorted([*train.documents, *val.documents]) == list(range(300))
    assert val.n_bytes == pytest.approx(0.1 * corpus.sizes.sum(), rel=0.05)
    assert not set(texts(train)) & set(texts(val))


def test_the_split_depends_on_content_and_not_on_order():
    documents = [b"%d " % i * 30 for i in range(50)]
    _, val = split_corpus(Documents(*documents), 0.2)
    _, again = split_corpus(Documents(*reversed(documents)), 0.2)
    assert sorted(texts(val)) == sorted(texts(again))


def test_equal_documents_land_on_the_same_side():
    corpus = Documents(*(b"%d " % (i % 25) * 30 for i in range(100)))
    train, val = split_corpus(corpus, 0.3)
    assert not set(texts(train)) & set(texts(val))


def test_a_single_document_gives_its_tail_from_a_new_line_on():
    lines = b"".join(b"line %d\n" % i for i in range(1000))
    train, val = split_corpus(Documents(lines), 0.1)
    (head,), (tail,) = texts(train), texts(val)
    assert (head + tail).encode() == lines
    assert head.endswith("\n")
    assert 0.09 < len(tail) / len(lines) <= 0.1


@pytest.mark.parametrize("character", ["a", "é", "字", "😀"])
def test_a_single_line_is_cut_between_two_characters(character):
    train, val = split_corpus(Documents((character * 101).encode()), 0.1)
    (head,), (tail,) = texts(train), texts(val)
    assert head + tail == character * 101
    assert 5 <= len(tail) <= 12


def test_a_late_newline_does_not_starve_validation():
    _, val = split_corpus(Documents(b"a" * 10_000 + b"\nend\n"), 0.1)
    assert val.n_bytes > 900


def test_documents_that_are_all_too_long_give_the_tail_of_the_longest():
    corpus = Documents(b"a" * 1000, b"b" * 2000, b"c" * 500, b"tiny")
    train, val = split_corpus(corpus, 0.05)
    assert set(texts(val)[0]) == {"b"}
    assert [len(text) for text in texts(train)] == [1000, 2000 - val.n_bytes, 500, 4]


def test_a_split_that_the_source_brings_is_kept():
    corpus = Documents(b"one", b"", b"two", b"three", given_val=np.array([False, False, True, False]))
    train, val = split_corpus(corpus, 0.5)
    assert (texts(train), texts(val)) == (["one", "three"], ["two"])


@pytest.mark.parametrize("documents", [[], [b""], [b"a"], ["é".encode()]])
def test_too_little_to_split_is_refused(documents):
    with pytest.raises(UserError, match="data=text"):
        split_corpus(Documents(*documents), 0.05)


def test_an_empty_side_of_a_given_split_is_refused():
    with pytest.raises(UserError, match="validation split holds no text"):
        split_corpus(Documents(b"one", b"", given_val=np.array([False, True])), 0.5)


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_no_byte_is_lost_and_no_side_is_empty(documents, fraction):
    corpus = Documents(*documents)
    try:
        train, val = split_corpus(corpus, fraction)
    except UserError:
        assert corpus.sizes.max() < 8
        return
    assert train.n_bytes > 0 < val.n_bytes
    assert train.n_bytes + val.n_bytes == corpus.sizes.sum()


@given(st.lists(st.one_of(st.text(max_size=40).map(str.encode), st.binary(max_size=20)), min_size=1).map(b"".join))
def test_a_document_read_in_pieces_is_the_document(document):
    before, splits.PIECE_BYTES = splits.PIECE_BYTES, 16
    try:
        pieces = list(Split(Documents(document), *np.array([[0], [0], [len(document)]])).pieces())
    finally:
        splits.PIECE_BYTES = before
    text = "".join(piece.text for piece in pieces)
    if (valid := document.decode("utf-8", "replace")).encode() == document:
        assert text == valid
        assert not sum(piece.replaced for piece in pieces)
    assert sum(piece.n_bytes for piece in pieces) == len(text.encode())
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


def test_invalid_utf8_is_replaced_and_counted():
    train, _ = split_corpus(Documents("a\ufffdb ".encode() + b"\xff\xfe ok\n" * 3 + b"x" * 100), 0.5)
    assert sum(piece.replaced for piece in train.pieces()) == 6


def test_a_sample_is_spread_over_the_split():
    corpus = Documents(*(b"%03d " % i * 250 for i in range(100)))
    train, _ = split_corpus(corpus, 0.01)
    sample = train.sample(20_000)
    documents_seen = {int(number) for text in sample for number in re.findall(r"(?<= )\d{3}(?= )", text)}
    assert 15_000 < sum(map(len, sample)) <= 20_000
    assert len([number for number in documents_seen if number < 20]) > 1
    assert len([number for number in documents_seen if number >= 80]) > 1
    assert sum(map(len, train.sample(10**9))) == train.n_bytes
