"""What est-data shows of a prepared corpus."""

import json
import math

import numpy as np
import pytest

from est_cli.config import TokenizerConfig
from est_cli.data.tokens import count_tokens, inspect, prepare, unigram_entropy


def test_unigram_entropy_is_that_of_the_frequencies(monkeypatch):
    monkeypatch.setattr("est_cli.data.inspection._CHUNK_TOKENS", 3)
    tokens = np.array([0, 0, 0, 0, 1, 1, 2, 3], dtype=np.uint16)
    assert unigram_entropy(tokens, 10) == pytest.approx(1.75 * math.log(2))
    assert count_tokens(tokens, 5).tolist() == [4, 2, 1, 1, 0]


def test_an_inspection_is_plain_and_says_what_is_there(corpus_folder, text_data):
    store = prepare(text_data(corpus_folder), TokenizerConfig("sentencepiece", vocab_size=400), 512, print, False)
    report = json.loads(json.dumps(inspect(store, n_samples=2, sample_tokens=20)))
    train = report["splits"]["train"]
    assert (train["tokens"], report["tokenizer"]["vocab_size"]) == (len(store.train), 400)
    assert train["bytes_per_token"] == pytest.approx(train["bytes"] / train["tokens"])
    assert train["unigram_entropy_bits"] == pytest.approx(train["unigram_entropy_nats"] / math.log(2))
    text = "".join(file.read_text() for file in sorted(corpus_folder.rglob("*.txt")))
    assert len(report["samples"]) == 2
    assert report["samples"][0] in text
