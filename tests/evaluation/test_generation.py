"""Sampled text is a pure function of the seed, never has an id that the tokenizer lacks, and comes as it is made."""

import pytest
import torch

from est_cli.data.tokenizers import ByteTokenizer
from est_cli.evaluation.generation import Decoding, generate_text, generate_tokens
from evaluation.tiny_runs import byte_model, model_of

TOKENIZER = ByteTokenizer()
PROMPT = TOKENIZER.encode("abc")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    return model_of(byte_model(request.param))


def tokens(model, prompt=PROMPT, **decoding) -> list[int]:
    return list(generate_tokens(model, prompt, TOKENIZER.vocab_size, TOKENIZER.eot, Decoding(**decoding)))


def test_temperature_0_and_a_top_k_of_one_take_the_likeliest_token_each_time(model):
    ids = list(PROMPT)
    for token in tokens(model, max_tokens=5, temperature=0.0):
        assert token == model.logits(torch.tensor([ids]))[0, -1, : TOKENIZER.vocab_size].argmax()
        ids.append(token)
    assert len(ids) == len(PROMPT) + 5
    assert tokens(model, max_tokens=5, top_k=1, seed=3) == ids[len(PROMPT) :]


def test_the_seed_decides_and_generation_goes_on_past_the_models_window(model):
    first, again, other = (tokens(model, max_tokens=40, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) > model.config.max_seq_len


def test_ids_that_the_tokenizer_lacks_never_appear(model):
    padded = model_of(model.config)
    padded.head_weight.data[TOKENIZER.vocab_size :] += 100 * padded.head_weight.data[:1]
    found = tokens(padded, max_tokens=30, temperature=3.0, top_k=None)
    assert max(found) < TOKENIZER.vocab_size


def test_an_end_of_text_ends_the_text(model):
    ending = model_of(model.config)
    ending.head_weight.data[TOKENIZER.eot] = 100 * ending.hidden(torch.tensor([PROMPT]))[0, -1]
    assert tokens(ending, max_tokens=5) == []


def test_an_empty_prompt_starts_a_document(model):
    assert tokens(model, [], max_tokens=4, temperature=0) == tokens(model, [TOKENIZER.eot], max_tokens=4, temperature=0)


@pytest.mark.parametrize(
    ("spoken", "pieces"),
    [("aü日b".encode(), [("a", 1), ("ü", 2), ("日", 3), ("b", 1)]), (b"a\xc3", [("a", 1), ("\ufffd", 1)])],
    ids=["no character is cut", "bytes that are no character come at the end"],
)
def test_pieces_of_text_come_as_soon_as_they_are_complete(model, monkeypatch, spoken, pieces):
    monkeypatch.setattr("est_cli.evaluation.generation.generate_tokens", lambda *_: iter(spoken))
    assert list(generate_text(model, TOKENIZER, "x", Decoding())) == pieces
