"""What is exported loads with transformers and gives our logits; what cannot be exported is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import train_config

from est_cli.config import SamplingConfig
from est_cli.data.tokenizers import ByteTokenizer, HFTokenizer
from est_cli.errors import UserError
from est_cli.evaluation.export import export
from est_cli.evaluation.run import packed, sampled_at, sampled_with, standalone
from est_cli.subnet.schedule import Rates
from evaluation.tiny_runs import byte_model, model_of

TOKENIZER = ByteTokenizer()
INPUTS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
NEEDS_TRANSFORMERS = "transformers is not installed: pip install 'est-cli[dev]'"


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_export_loads_with_transformers_and_gives_our_logits(transformers, tmp_path, family, bias, tied):
    model = model_of(byte_model(family, bias=bias, tie_embeddings=tied))
    out = tmp_path / "out"
    difference = export(model, model, TOKENIZER, out)
    assert difference < 1e-5
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert (loaded(INPUTS).logits - model.logits(INPUTS)).abs().max() < 1e-5
    assert type(loaded).__name__ == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = " a\n\tü\u2581 </s><|endoftext|>"
    assert tokenizer(text).input_ids == TOKENIZER.encode(text)
    assert tokenizer.decode(TOKENIZER.encode(text)) == text
    assert loaded.config.eos_token_id == tokenizer.eos_token_id == TOKENIZER.eot


def test_a_hugging_face_tokenizer_is_copied(transformers, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    given = Tokenizer(models.BPE())
    given.pre_tokenizer, given.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=259, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    given.train_from_iterator(["some words to read"] * 9, trainer)
    given.save(str(tmp_path / "tokenizer.json"))
    ours = HFTokenizer.open(str(tmp_path))
    model = model_of(byte_model("gpt2"))
    export(model, model, ours, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("some words\n to read").input_ids == ours.encode("some words\n to read")
    assert theirs.eos_token_id == ours.eot
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()


@pytest.mark.parametrize("begins", [True, False], ids=["template", "no template"])
def test_an_exported_tokenizer_gives_the_ids_of_training_as_people_call_it(transformers, tmp_path, begins):
    """Llama-3 puts a token before every text, Qwen has control tokens beyond the end: training saw neither."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    given = Tokenizer(models.BPE())
    given.pre_tokenizer, given.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=control, initial_alphabet=alphabet)
    given.train_from_iterator(["some words to read"] * 9, trainer)
    if begins:
        template = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
        given.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        given.enable_truncation(3)
    given.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "add_bos_token": begins}))
    ours, model = HFTokenizer.open(str(tmp_path)), model_of(byte_model("llama"))
    assert export(model, model, ours, tmp_path / "out") < 1e-5
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "some words <|im_start|>to<|endoftext|> read"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.eos_token_id == ours.eot == 2


def test_transformers_generates_from_an_export(transformers, tmp_path):
    model = model_of(byte_model("llama"))
    export(model, model, TOKENIZER, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = loaded.generate(INPUTS[:1, :3], max_new_tokens=3, do_sample=False)
    expected = model.logits(INPUTS[:1, :3])[0, -1].argmax()
    assert ids[0, 3] == expected


@pytest.mark.parametrize("gqa", ["group", "query"])
@pytest.mark.parametrize("rescale_layers", [False, True])
def test_a_subnetwork_becomes_a_smaller_model_with_the_packed_ones_logits(tmp_path, gqa, rescale_layers):
    model = model_of(byte_model("llama", bias=True))
    config = train_config(model.config, SamplingConfig(gqa=gqa, rescale_layers=rescale_layers))
    subnet = sampled_at(config, 1)
    small = standalone(packed(model, subnet), subnet)
    assert (small.config.n_heads, small.config.d_ff, small.config.n_layers) == ({"group": 4, "query": 3}[gqa], 8, 2)
    assert export(small, packed(model, subnet), TOKENIZER, tmp_path / "out") in (None, pytest.approx(0, abs=1e-5))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["head_dim"], written["intermediate_size"]) == (2, 8)
    layers = {name.split(".")[2] for name in load_file(tmp_path / "out" / "model.safetensors") if "layers" in name}
    assert layers == {"0", "1"}
    torch.testing.assert_close(small.logits(INPUTS), packed(model, subnet).logits(INPUTS), atol=1e-5, rtol=1e-5)


def test_gpt2_exports_fewer_neurons_and_layers(transformers, tmp_path):
    model = model_of(byte_model("gpt2"))
    subnet = sampled_with(train_config(model.config), Rates(mlp=0.5, layers=0.5))
    reference = packed(model, subnet)
    assert export(standalone(reference, subnet), reference, TOKENIZER, tmp_path / "out") < 1e-5
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.n_inner, loaded.config.n_layer, loaded.config.n_head) == (8, 2, 4)


def test_gpt2_with_fewer_heads_is_refused_and_what_works_is_said(tmp_path):
    model = model_of(byte_model("gpt2"))
    subnet = sampled_with(train_config(model.config), Rates(heads=0.5))
    with pytest.raises(UserError, match=r"model.n_heads=2: GPT2LMHeadModel ties .* fewer MLP neurons and layers"):
        export(standalone(packed(model, subnet), subnet), model, TOKENIZER, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_llama_needs_a_number_of_heads_that_divides_the_width(tmp_path):
    model = model_of(byte_model("llama", n_heads=10, n_kv_heads=5))
    with pytest.raises(UserError, match=r"model.n_heads=10: LlamaForCausalLM needs .* model.d_model=12; .*: none"):
        export(model, model, TOKENIZER, tmp_path / "out")


def test_every_setting_that_no_class_has_is_named(tmp_path):
    model = model_of(byte_model("llama", norm="layernorm", mlp="gelu"))
    with pytest.raises(UserError) as error:
        export(model, model, TOKENIZER, tmp_path / "out")
    assert [problem.split(":")[0] for problem in error.value.problems] == ["model.norm=layernorm", "model.mlp=gelu"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    model = model_of(byte_model("llama"))
    with pytest.raises(UserError, match="exists already; must be a new or an empty folder"):
        export(model, model, TOKENIZER, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_an_export_that_differs_is_an_error_and_leaves_nothing(transformers, tmp_path):
    model = model_of(byte_model("llama"))
    other = model_of(byte_model("llama"))
    other.blocks[1].attention.out.weight.data[0, 0] += 0.01
    with pytest.raises(RuntimeError, match="logits differ"):
        export(model, other, TOKENIZER, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_transformers_the_folder_is_written_and_not_checked(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    model = model_of(byte_model("llama"))
    assert export(model, model, TOKENIZER, tmp_path / "out") is None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_a_plan_step_is_one_of_the_run():
    config = train_config(replace(byte_model("llama")))
    with pytest.raises(UserError, match=r"plan_step=15: must be an integer in \[0, 14\]"):
        sampled_at(config, 15)
