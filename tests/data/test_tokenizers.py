"""Bytes, SentencePiece and tokenizer.json: nothing is lost, sizes fit the model, other files are refused."""

import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_corpora import PIECES, Documents, prose, refusal, sentencepiece_model
from tokenizers.pre_tokenizers import ByteLevel

from est_cli.config import TokenizerConfig
from est_cli.data.splits import split_corpus
from est_cli.data.tokenizers import ByteTokenizer, HFTokenizer, SentencePieceTraining, choose_tokenizer, load_tokenizer
from est_cli.errors import UserError

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
TRICKY = ["", " ", "\u2581", "a\u2581 b\u2581\u2581", "<s></s><unk><0x41>", "\0\r\n\t  x\ufffe\U0001f600", "\u2585"]
TRICKY += [" \n" * 3000, "ab\u5b57" * 50_000, "def f(x):\n    return x\n" * 200]


def train(*texts: str, vocab_size: int | str = 400, model_vocab_size: int = 512, say=lambda _: None):
    """What tokenizer=sentencepiece trains on the training split of `texts`."""
    sample = split_corpus(Documents(*(text.encode() for text in texts)), 0.1)[0].sample(20_000_000)
    return SentencePieceTraining(TokenizerConfig("sentencepiece", vocab_size), model_vocab_size).train(sample, say)


@pytest.mark.parametrize("text", TRICKY)
def test_nothing_of_a_tricky_text_is_lost(text, trained, llama):
    for tokenizer in (trained, ByteTokenizer(), llama):
        if tokenizer is not llama or "\u2581" not in text[:1]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ANY_TEXT)
@example("\u2581a")
@settings(max_examples=300)
def test_no_text_is_lost_and_every_byte_is_counted(trained, gpt2, text):
    for tokenizer in (trained, gpt2, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.eot]) == text
        assert tokenizer.eot not in ids
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@given(st.lists(ANY_TEXT, max_size=5))
def test_a_batch_is_its_texts_one_by_one(trained, llama, texts):
    for tokenizer in (trained, llama, ByteTokenizer()):
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x  # a list\n\n" * 300,
        "the  value of a list is   not None " * 300,
        "".join(f"{i} \t" + "\n" * (i % 3) + " " * (i % 4) for i in range(3000)),
    ],
    ids=["code", "one line", "spaces"],
)
def test_a_text_encoded_in_chunks_has_the_tokens_of_the_whole(text, trained, llama, llama_model):
    cut = (text.find("\n", 5000) + 1) or text.find("e ", 5000) + 1
    for tokenizer, proto in ((trained, trained.proto), (llama, llama_model)):
        whole = sentencepiece.SentencePieceProcessor(model_proto=proto).encode(text)
        assert tokenizer.encode(text) == whole
        assert np.concatenate(tokenizer.encode_batch([text[:cut], text[cut:]], [False, True])).tolist() == whole


@pytest.mark.parametrize("text", ["hello world, hello", "\u2585" * 100, "\t\n" * 100, "\0" * 100, " " * 100])
def test_a_small_text_lowers_the_vocabulary_and_says_so(text, said):
    tokenizer = train(text, vocab_size="auto", model_vocab_size=32000, say=said.append)
    assert 256 < tokenizer.vocab_size < 300
    assert any("tokenizer.vocab_size: lowered from 4096 to" in line for line in said)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_more_kinds_of_characters_than_pieces_train_a_tokenizer_that_loses_nothing():
    text = "".join(chr(0x4E00 + i % 3000 * (i % 7) % 3000) for i in range(20_000))
    tokenizer = train(text)
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("separator", ["", " "], ids=["never", "once"])
def test_a_space_that_is_rare_comes_back_as_a_space(separator):
    texts = ["".join(chr(0x4E00 + (i * 7 + number) % 400) for i in range(800)) for number in range(4)]
    texts[0] += separator
    tokenizer = SentencePieceTraining(PIECES, 512).train(texts, lambda _: None)
    assert tokenizer.decode(tokenizer.encode("a b  \u4e00 c")) == "a b  \u4e00 c"


@pytest.mark.parametrize(("model_vocab_size", "expected"), [(512, 512), (4096, 4096), (50304, 4096)])
def test_auto_takes_the_models_size_up_to_4096(model_vocab_size, expected):
    assert choose_tokenizer(TokenizerConfig("sentencepiece"), model_vocab_size).vocab_size == expected


def test_a_given_model_is_used_as_it_is(llama_file, llama_model, tmp_path):
    tokenizer = choose_tokenizer(TokenizerConfig("sentencepiece", path=str(llama_file)), 400)
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    assert tokenizer.encode("return the value") == reference.encode("return the value")
    assert (tokenizer.vocab_size, tokenizer.eot) == (400, reference.eos_id())
    assert tokenizer.token_bytes[tokenizer.eot] == 0
    tokenizer.save(tmp_path)
    assert load_tokenizer("sentencepiece", tmp_path).definition == tokenizer.definition


def byte_level(special_tokens: list[str]):
    """A byte-level BPE tokenizer as GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special_tokens, show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([prose(50)], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def gpt2_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    tokenizer = byte_level(["<|endoftext|>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def gpt2(gpt2_file):
    return HFTokenizer.open(str(gpt2_file))


def test_no_setting_of_the_file_and_no_special_token_in_the_text_changes_a_batch(gpt2, gpt2_file):
    texts = [prose(20), "a", "a<|endoftext|>b", ""]
    batch = gpt2.encode_batch(texts)
    assert [gpt2.decode(ids) for ids in batch] == texts
    on_one_core = load_tokenizer("hf", gpt2_file.parent)
    on_one_core.threads = 1
    assert [ids.tolist() for ids in batch] == [ids.tolist() for ids in on_one_core.encode_batch(texts)]
    assert gpt2.eot not in batch[2]
    assert gpt2.token_bytes[gpt2.eot] == 0


def test_byte_fallback_pieces_count_one_byte(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xC3>": 3, "<0xA9>": 4, "\u2581": 5, "a": 6, "\u2581a": 7}
    model = tokenizers.models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    llama = tokenizers.Tokenizer(model)
    llama.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    decoders = tokenizers.decoders
    llama.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    llama.add_special_tokens(["<unk>", "<s>", "</s>"])
    llama.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer.open(str(tmp_path))
    assert tokenizer.eot == 2
    assert tokenizer.token_bytes.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert tokenizer.decode(tokenizer.encode("é a")) == "é a"


def test_the_end_of_text_is_what_the_config_beside_it_says(tmp_path):
    byte_level(["<|endoftext|>", "<|stop|>"]).save(str(tmp_path / "tokenizer.json"))
    assert HFTokenizer.open(str(tmp_path)).eot == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|stop|>"}}))
    assert HFTokenizer.open(str(tmp_path)).eot == 1
    (tmp_path / "copy").mkdir()
    HFTokenizer.open(str(tmp_path)).save(tmp_path / "copy")
    copy = load_tokenizer("hf", tmp_path / "copy")
    assert (copy.eot, copy.definition) == (1, HFTokenizer.open(str(tmp_path)).definition)


def test_a_name_on_the_hub_is_looked_for_here_then_there(gpt2_file, tmp_path, monkeypatch):
    asked = []

    def fetch(name, filename):
        asked.append((name, filename))
        return gpt2_file if filename == "tokenizer.json" else None

    monkeypatch.setattr("est_cli.data.hub.fetch", fetch)
    monkeypatch.chdir(tmp_path)
    there = HFTokenizer.open("owner/name")
    assert asked == [("owner/name", "tokenizer.json"), ("owner/name", "tokenizer_config.json")]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    there.save(tmp_path / "owner" / "name")
    assert HFTokenizer.open("owner/name").definition == there.definition
    assert len(asked) == 2


@pytest.mark.parametrize(("answers", "why"), [(False, "could not be reached"), (True, "has no tokenizer.json")])
def test_a_tokenizer_that_the_hub_does_not_give_says_what_to_place_where(answers, why, monkeypatch):
    monkeypatch.setattr("est_cli.data.hub.answers", lambda: answers)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: 1 / 0)
    said = refusal(HFTokenizer.open, "owner/none")
    for words in ("tokenizer.path=owner/none: ", why, "hf download owner/none tokenizer.json", "tokenizer.path=FOLDER"):
        assert words in said


@pytest.mark.parametrize("path", ["./a/b", "/no/where", "a/b/c", "~/a", "a/tokenizer.json"])
def test_a_path_that_is_no_name_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr("est_cli.data.hub.fetch", lambda *_: pytest.fail("asked for"))
    with pytest.raises(UserError, match="cannot be read"):
        HFTokenizer.open(path)


NO_MODEL, NO_JSON = "must be a SentencePiece model", r"must be a Hugging Face tokenizer\.json"
REFUSED = [
    ("sentencepiece", "tokenizer.model", b"", NO_MODEL),
    ("sentencepiece", "tokenizer.model", b"not a model\n" * 50, NO_MODEL),
    ("sentencepiece", "tokenizer.model", b'{"model": {}}', NO_MODEL),
    ("sentencepiece", "tokenizer.model", bytes(300), NO_MODEL),
    ("sentencepiece", "tokenizer.model", lambda: sentencepiece_model(50, vocab_size=35)[:-50], NO_MODEL),
    ("sentencepiece", "tokenizer.model", lambda: sentencepiece_model(50, vocab_size=35, eos_id=-1), "end-of-sentence"),
    ("sentencepiece", "tokenizer.model", lambda: sentencepiece_model(50, vocab_size=35), "has 35 ids.*vocab_size=34"),
    ("sentencepiece", "tokeniser.model", b"", r"did you mean 'tokeniser\.model'"),
    ("hf", "tokenizer.json", b"", NO_JSON),
    ("hf", "tokenizer.json", b"{}", NO_JSON),
    ("hf", "tokenizer.json", b"no json", NO_JSON),
    ("hf", "tokenizer.json", b'{"model": {"type": "BPE"}}', NO_JSON),
    ("hf", "tokenizer.json", b"\0", NO_JSON),
    ("hf", "tokenizer.json", lambda: byte_level([]).to_str().encode(), r"<\|endoftext\|>"),
    ("hf", "tokenizer.json", lambda: byte_level(["</s>"]).to_str().encode(), "has 376 ids.*model.vocab_size=34"),
    ("hf", "other.json", b"", "cannot be read"),
]


@pytest.mark.parametrize(("kind", "name", "content", "message"), REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_one_message(kind, name, content, message, tmp_path, capfd):
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    path = tmp_path / {"sentencepiece": "tokenizer.model", "hf": "tokenizer.json"}[kind]
    with pytest.raises(UserError, match=rf"^tokenizer\.path={path}: .*{message}"):
        choose_tokenizer(TokenizerConfig(kind, path=str(path)), 34)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", ['{"eos_token": ', "[]", '{"eos_token": 3}'])
def test_a_broken_config_beside_the_tokenizer_is_named(gpt2_file, tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(gpt2_file.read_text())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.path=\S+: \S+tokenizer_config\.json"):
        HFTokenizer.open(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "model_vocab_size", "message"),
    [
        (TokenizerConfig("sentencepiece", vocab_size=100), 512, "tokenizer.vocab_size=100: must be at least 262"),
        (TokenizerConfig("sentencepiece"), 200, "model.vocab_size=200: must be at least 262 .* tokenizer=byte has 257"),
        (TokenizerConfig("byte"), 256, "tokenizer=byte: has 257 ids, .* model.vocab_size=256"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers(config, model_vocab_size, message):
    with pytest.raises(UserError, match=f"^{message}"):
        choose_tokenizer(config, model_vocab_size)
