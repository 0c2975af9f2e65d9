"""An export loads with transformers and gives our logits and our ids; what cannot be exported is refused by name."""

import json
import sys

import pytest
import torch
from data.tiny_corpora import llama_model, prose, sentencepiece_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import train_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from est_cli.config import SamplingConfig, TokenizerConfig
from est_cli.data.tokenizers import ByteTokenizer, HFTokenizer, SentencePieceTokenizer, SentencePieceTraining
from est_cli.errors import UserError
from est_cli.evaluation.export import SAMPLES, check_free, convert, export
from est_cli.evaluation.run import packed, sampled_at, sampled_with, standalone
from est_cli.subnet.schedule import Rates
from evaluation.tiny_runs import byte_model, model_of

TOKENIZER = ByteTokenizer()
INPUTS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
NEEDS_TRANSFORMERS = "transformers is not installed: pip install 'est-cli[dev]'"


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_export_loads_with_transformers_and_gives_our_logits(transformers, out, family, bias, tied):
    model = model_of(byte_model(family, bias=bias, tie_embeddings=tied))
    assert export(model, model, TOKENIZER, out) < 1e-5
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert (loaded(INPUTS).logits - model.logits(INPUTS)).abs().max() < 1e-5
    assert type(loaded).__name__ == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family]
    generated = loaded.generate(INPUTS[:1, :3], max_new_tokens=3, do_sample=False)
    assert generated[0, 3] == model.logits(INPUTS[:1, :3])[0, -1].argmax()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = " a\n\tü\u2581 </s><|endoftext|>"
    assert tokenizer(text).input_ids == TOKENIZER.encode(text)
    assert tokenizer.decode(TOKENIZER.encode(text)) == text
    assert loaded.config.eos_token_id == tokenizer.eos_token_id == TOKENIZER.eot


@pytest.mark.parametrize("control", [[], ["<|im_start|>", "<|im_end|>"]], ids=["plain", "control tokens"])
@pytest.mark.parametrize("begins", [False, True], ids=["no template", "template"])
def test_an_exported_tokenizer_gives_the_ids_of_training_as_people_call_it(
    transformers, tmp_path, out, control, begins
):
    """Llama-3 puts a token before every text, Qwen has control tokens beyond the end: training saw neither."""
    source = Tokenizer(models.BPE())
    source.pre_tokenizer, source.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", *control]
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=special, initial_alphabet=alphabet)
    source.train_from_iterator(["some words to read"] * 9, trainer)
    if begins:
        template = processors.TemplateProcessing(single=f"{special[-1]} $A", special_tokens=[(special[-1], 1)])
        source.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        source.enable_truncation(3)
    file = tmp_path / "tokenizer.json"
    source.save(str(file))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[-1], "add_bos_token": begins}))
    ours, model = HFTokenizer.open(str(tmp_path)), model_of(byte_model("llama"))
    assert export(model, model, ours, out) < 1e-5
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = "some words\n <|im_start|>to<|endoftext|> read"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.eos_token_id == ours.eot == len(control)
    assert ((out / "tokenizer.json").read_text() == file.read_text()) is not begins, "copied if it adds nothing"


@pytest.mark.parametrize(
    ("family", "sampling", "rates", "sizes"),
    [("llama", SamplingConfig(gqa="group"), None, (4, 8, 2)),
     ("llama", SamplingConfig(gqa="query", rescale_layers=True), None, (3, 8, 2)),
     ("gpt2", SamplingConfig(), Rates(mlp=0.5, layers=0.5), (4, 8, 2))],
)  # fmt: skip
def test_a_subnetwork_becomes_a_smaller_model_with_the_packed_ones_logits(
    transformers, out, family, sampling, rates, sizes
):
    model = model_of(byte_model(family, bias=True))
    config = train_config(model.config, sampling)
    subnet = sampled_with(config, rates) if rates else sampled_at(config, 1)
    reference = packed(model, subnet)
    small = standalone(reference, subnet)
    assert (small.config.n_heads, small.config.d_ff, small.config.n_layers) == sizes
    assert export(small, reference, TOKENIZER, out) < 1e-5
    assert transformers.AutoConfig.from_pretrained(out).num_hidden_layers == 2
    torch.testing.assert_close(small.logits(INPUTS), reference.logits(INPUTS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "problems"),
    [
        ("gpt2", {"head_dim": 2}, [r"model.n_heads=4: GPT2LMHeadModel ties .* fewer MLP neurons and layers"]),
        ("llama", {"n_heads": 10, "n_kv_heads": 5},
         [r"model.n_heads=10: LlamaForCausalLM needs .* model.d_model=12; .*: none"]),
        ("llama", {"norm": "layernorm", "mlp": "gelu"}, ["model.norm=layernorm:", "model.mlp=gelu:"]),
    ],
    ids=["GPT-2 of fewer heads", "heads that do not divide the width", "every setting that no class has"],
)  # fmt: skip
def test_what_no_class_can_hold_is_refused_and_what_works_is_said(out, family, changes, problems):
    model = model_of(byte_model(family, **changes))
    with pytest.raises(UserError, match=".*\n?".join(problems)) as error:
        export(model, model, TOKENIZER, out)
    assert len(error.value.problems) == len(problems) and not list(out.parent.iterdir())


def test_nothing_is_overwritten(out):
    out.mkdir()
    check_free(out)
    (out / "precious.txt").write_text("mine")
    for place in (out, out / "precious.txt"):
        with pytest.raises(UserError, match="exists already; must be a new or an empty folder"):
            check_free(place)


def test_an_export_that_differs_is_an_error_and_leaves_nothing(transformers, out):
    model, other = model_of(byte_model("llama")), model_of(byte_model("llama"))
    other.blocks[1].attention.out.weight.data[0, 0] += 0.01
    with pytest.raises(RuntimeError, match="logits differ"):
        export(model, other, TOKENIZER, out)
    assert not list(out.parent.iterdir())


def test_without_transformers_the_folder_is_written_and_not_checked(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = model_of(byte_model("llama"))
    assert export(model, model, TOKENIZER, out) is None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in out.iterdir()}


def test_a_plan_step_is_one_of_the_run():
    with pytest.raises(UserError, match=r"plan_step=15: must be an integer in \[0, 14\]"):
        sampled_at(train_config(byte_model("llama")), 15)


TEXTS = st.text(alphabet=st.one_of(st.sampled_from(" \n\t\u2581aeinort<>/s0é"), st.characters(codec="utf-8")))


@pytest.fixture(scope="module")
def pairs():
    training = SentencePieceTraining(TokenizerConfig("sentencepiece", vocab_size=400), 512)
    trained = training.train([prose(40, seed) for seed in range(40)], lambda _: None)
    every = (trained, SentencePieceTokenizer(llama_model()), ByteTokenizer())
    return [(tokenizer, convert(tokenizer)) for tokenizer in every]


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


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"model_type": "bpe", "vocab_size": 100, "byte_fallback": False}, "a tokenizer.json: the ids of "),
     ({"model_type": "unigram", "vocab_size": 45}, "not a BPE model")],
    ids=["a model that changes its text", "a unigram model"],
)  # fmt: skip
def test_what_a_tokenizer_json_cannot_hold_is_refused(options, problem):
    with pytest.raises(UserError, match=problem):
        convert(SentencePieceTokenizer(sentencepiece_model(100, **options)))
