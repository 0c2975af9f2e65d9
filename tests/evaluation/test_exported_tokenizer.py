"""A tokenizer.json of ours gives the ids of ours, for any text, and decodes without loss."""

import pytest
from data.tiny_corpora import llama_model, prose, sentencepiece_model
from hypothesis import given, settings
from hypothesis import strategies as st

from est_cli.config import TokenizerConfig
from est_cli.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, SentencePieceTraining
from est_cli.errors import UserError
from est_cli.evaluation.export import SAMPLES, convert

TEXTS = st.text(alphabet=st.one_of(st.sampled_from(" \n\t\u2581aeinort<>/s0é"), st.characters(codec="utf-8")))


@pytest.fixture(scope="module")
def pairs():
    training = SentencePieceTraining(TokenizerConfig("sentencepiece", vocab_size=400), 512)
    trained = training.train([prose(40, seed) for seed in range(40)], lambda _: None)
    given = (trained, SentencePieceTokenizer(llama_model()), ByteTokenizer())
    return [(tokenizer, convert(tokenizer)) for tokenizer in given]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_the_ids_are_equal_and_nothing_is_lost(pairs, text):
    for ours, theirs in pairs:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", [prose(60), prose(5) * 30, " " * 500, "aba" * 200, *SAMPLES])
def test_long_and_awkward_texts_have_equal_ids(pairs, text):
    for ours, theirs in pairs:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_the_end_of_text_keeps_its_id(pairs):
    for tokenizer, converted in pairs:
        ends = {"byte": "<|endoftext|>", "sentencepiece": "</s>"}
        assert converted.token_to_id(ends[tokenizer.kind]) == tokenizer.eot
        assert converted.get_vocab_size() == tokenizer.vocab_size


def test_a_model_that_changes_its_text_is_refused():
    model = sentencepiece_model(100, model_type="bpe", vocab_size=100, byte_fallback=False)
    with pytest.raises(UserError, match=r"cannot be written as a tokenizer.json: the ids of "):
        convert(SentencePieceTokenizer(model))


def test_a_unigram_model_is_refused():
    model = sentencepiece_model(100, model_type="unigram", vocab_size=45)
    with pytest.raises(UserError, match="not a BPE model"):
        convert(SentencePieceTokenizer(model))
