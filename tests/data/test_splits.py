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


def test_every_document_is_on_one_side_with_its_equals_and_validation_gets_its_share():
    corpus = Documents(*(b"%d " % number * (20 + number % 7) for number in [*range(200), *range(100)]))
    train, val = split_corpus(corpus, 0.1)
    assert sorted([*train.documents, *val.documents]) == list(range(300))
    assert val.n_bytes == pytest.approx(0.1 * corpus.sizes.sum(), rel=0.05)
    assert not set(texts(train)) & set(texts(val))


def test_the_split_depends_on_content_and_not_on_order():
    documents = [b"%d " % i * 30 for i in range(50)]
    _, val = split_corpus(Documents(*documents), 0.2)
    _, again = split_corpus(Documents(*reversed(documents)), 0.2)
    assert sorted(texts(val)) == sorted(texts(again))


@pytest.mark.parametrize(
    ("text", "head_end", "tail_bytes"),
    [
        ("".join(f"line {i}\n" for i in range(1000)), "\n", (0.09 * 8890, 0.1 * 8890)),
        ("a" * 10_000 + "\nend\n", "a", (900, 1001)),
        ("a" * 101, "a", (10, 10)),
        ("é" * 101, "é", (20, 22)),
        ("字" * 101, "字", (27, 33)),
        ("😀" * 101, "😀", (36, 44)),
    ],
    ids=["from a new line on", "a late newline does not starve it", "a", "é", "字", "😀"],
)
def test_the_tail_of_a_single_document_validates(text, head_end, tail_bytes):
    train, val = split_corpus(Documents(text.encode()), 0.1)
    assert texts(train)[0] + texts(val)[0] == text
    assert texts(train)[0].endswith(head_end)
    assert tail_bytes[0] <= val.n_bytes <= tail_bytes[1]


def test_documents_that_are_all_too_long_give_the_tail_of_the_longest():
    corpus = Documents(b"a" * 1000, b"b" * 2000, b"c" * 500, b"tiny")
    train, val = split_corpus(corpus, 0.05)
    assert set(texts(val)[0]) == {"b"}
    assert [len(text) for text in texts(train)] == [1000, 2000 - val.n_bytes, 500, 4]


def test_a_split_that_the_source_brings_is_kept_unless_a_side_is_empty():
    corpus = Documents(b"one", b"", b"two", b"three", given_val=np.array([False, False, True, False]))
    train, val = split_corpus(corpus, 0.5)
    assert (texts(train), texts(val)) == (["one", "three"], ["two"])
    with pytest.raises(UserError, match="validation split holds no text"):
        split_corpus(Documents(b"one", b"", given_val=np.array([False, True])), 0.5)


@pytest.mark.parametrize("documents", [[], [b""], [b"a"], ["é".encode()]])
def test_too_little_to_split_is_refused(documents):
    with pytest.raises(UserError, match="data=text"):
        split_corpus(Documents(*documents), 0.05)


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


def test_a_sample_is_spread_over_the_split():
    corpus = Documents(*(b"%03d " % i * 250 for i in range(100)))
    train, _ = split_corpus(corpus, 0.01)
    sample = train.sample(20_000)
    seen = {int(number) for text in sample for number in re.findall(r"(?<= )\d{3}(?= )", text)}
    assert 15_000 < sum(map(len, sample)) <= 20_000
    assert len(seen & {*range(20)}) > 1 < len(seen & {*range(80, 100)})
    assert sum(map(len, train.sample(10**9))) == train.n_bytes
