"""tokenizer.json files through the tokenizers library."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import prose

from est_cli.config import TokenizerConfig
from est_cli.data.tokenizers import HFTokenizer, choose_tokenizer, load_tokenizer
from est_cli.errors import UserError

tokenizers = pytest.importorskip("tokenizers")


def byte_level(special_tokens: list[str], vocab_size: int = 400):
    """A byte-level BPE tokenizer as GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
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


def llama_json(folder):
    """A tokenizer.json of Llama's kind: spaces as U+2581, byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xC3>": 3, "<0xA9>": 4, "\u2581": 5, "a": 6, "\u2581a": 7}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=100))
@settings(max_examples=100)
def test_byte_level_bpe_loses_nothing_and_counts_its_bytes(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert gpt2.token_bytes[ids].sum() == len(text.encode())


def test_truncation_and_padding_of_the_file_are_not_applied(gpt2):
    long, short = gpt2.encode_batch([prose(20), "a"])
    assert gpt2.decode(long) == prose(20)
    assert gpt2.decode(short) == "a"


def test_one_thread_gives_the_ids_of_all(gpt2):
    texts = [prose(5, seed) for seed in range(6)] + [""]
    for one, all_ in zip(gpt2.encode_batch(texts, threads=1), gpt2.encode_batch(texts), strict=True):
        assert one.tolist() == all_.tolist()


def test_a_special_token_in_a_text_stays_text(gpt2):
    ids = gpt2.encode("a<|endoftext|>b")
    assert gpt2.eot not in ids
    assert gpt2.decode(ids) == "a<|endoftext|>b"
    assert gpt2.token_bytes[gpt2.eot] == 0


def test_byte_fallback_pieces_count_one_byte(tmp_path):
    llama_json(tmp_path)
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


def test_a_file_without_an_end_of_text_is_refused(tmp_path):
    byte_level([]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.path=.*<\|endoftext\|>"):
        HFTokenizer.open(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"model": {"type": "BPE"}}', "\x00"])
def test_a_file_that_is_no_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.path=.*must be a Hugging Face tokenizer\.json"):
        HFTokenizer.open(str(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.path="):
        HFTokenizer.open(str(tmp_path / "tokenizer.json"))


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
    with pytest.raises(UserError) as caught:
        HFTokenizer.open("owner/name-of-none")
    for words in (
        "tokenizer.path=owner/name-of-none",
        why,
        "hf download owner/name-of-none tokenizer.json",
        "tokenizer.path=FOLDER",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("path", ["./a/b", "/no/where", "a/b/c", "~/a", "a/tokenizer.json"])
def test_a_path_that_is_no_name_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr("est_cli.data.hub.fetch", lambda *_: pytest.fail("asked for"))
    with pytest.raises(UserError, match="cannot be read"):
        HFTokenizer.open(path)


def test_more_ids_than_the_model_are_refused(gpt2_file):
    config = TokenizerConfig("hf", path=str(gpt2_file))
    size = choose_tokenizer(config, 50304).vocab_size
    with pytest.raises(UserError, match=f"has {size} ids.*model.vocab_size={size - 1}"):
        choose_tokenizer(config, size - 1)


@pytest.mark.parametrize("content", ['{"eos_token": ', "[]", '{"eos_token": 3}'])
def test_a_broken_config_beside_the_tokenizer_is_named(gpt2_file, tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(gpt2_file.read_text())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.path=\S+: \S+tokenizer_config\.json"):
        HFTokenizer.open(str(tmp_path))
