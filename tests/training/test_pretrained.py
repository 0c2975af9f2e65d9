"""A run starts from a Hugging Face folder: our weights come back bit for bit, others as transformers reads them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, random_batch, random_master, snapshot, train_config

from est_cli.errors import UserError
from est_cli.model.huggingface import to_huggingface
from est_cli.model.transformer import Transformer
from est_cli.training.pretrained import check_pretrained, load_pretrained
from tests.training.runs import start


def write(folder, model):
    """As an export writes it, without the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = to_huggingface(model)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def started(config, folder):
    model = Transformer(replace(config, init_from=folder))
    load_pretrained(model)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_in_again_is_the_identity(tmp_path, family, bias, tied):
    model = random_master(replace(FAMILIES[family], bias=bias, tie_embeddings=tied), torch.float32)
    found = snapshot(started(model.config, write(tmp_path / "out", model)))
    expected = snapshot(model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saved_gives_the_logits_that_transformers_gives(tmp_path, family):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config, _ = to_huggingface(random_master(FAMILIES[family], torch.float32))
    peer = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    inputs, _ = random_batch(FAMILIES[family])
    ours = started(FAMILIES[family], str(tmp_path / "theirs"))
    with torch.no_grad():
        assert (ours.logits(inputs) - peer(inputs).logits).abs().max() < 1e-5


def test_biases_are_not_dropped_unless_they_are_zero(tmp_path):
    folder = write(tmp_path / "out", random_master(FAMILIES["gpt2"], torch.float32))
    with pytest.raises(UserError, match=r"give model.bias=true"):
        check_pretrained(replace(FAMILIES["gpt2"], bias=False, init_from=folder))


def test_training_starts_from_the_folder(tmp_path):
    model = random_master(FAMILIES["llama"], torch.float32)
    folder = write(tmp_path / "out", model)
    config = train_config(replace(model.config, init_from=folder))
    training, _ = start(config)
    assert all(torch.equal(p, snapshot(model)[name]) for name, p in training.model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_vocabulary_rows_have_the_mean_logit(tmp_path, family):
    model = random_master(FAMILIES[family], torch.float32)
    padded = started(replace(model.config, vocab_size=32), write(tmp_path / "out", model))
    inputs, _ = random_batch(model.config)
    logits = padded.logits(inputs)
    torch.testing.assert_close(logits[..., :29], model.logits(inputs))
    torch.testing.assert_close(logits[..., 29:], logits[..., :29].mean(-1, keepdim=True).expand(-1, -1, 3))


def test_names_of_the_first_gpt2_files_are_read(tmp_path):
    model = random_master(FAMILIES["gpt2"], torch.float32)
    folder = write(tmp_path / "out", model)
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 16, 16)}, tmp_path / "out" / "model.safetensors")
    found = snapshot(started(model.config, folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in snapshot(model).items())


def test_weights_in_several_files_and_half_precision_are_read(tmp_path):
    model = random_master(FAMILIES["llama"], torch.float32)
    folder = write(tmp_path / "out", model)
    whole = tmp_path / "out" / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(whole).items()}
    whole.unlink()
    names = list(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, tmp_path / "out" / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    found = snapshot(started(model.config, folder))
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in snapshot(model).items())


def test_every_differing_key_is_named_with_the_override_to_paste(tmp_path):
    folder = write(tmp_path / "out", random_master(FAMILIES["llama"], torch.float32))
    changes = {"n_layers": 4, "d_ff": 8, "vocab_size": 28, "rope_theta": 500.0, "bias": True, "init_from": folder}
    with pytest.raises(UserError) as error:
        check_pretrained(replace(FAMILIES["llama"], **changes))
    assert [problem.rpartition("; give ")[2] for problem in error.value.problems] == [
        "model.n_layers=3",
        "model.d_ff=16",
        "model.bias=false",
        "model.vocab_size=29",
        "model.rope_theta=10000.0",
    ]


def test_a_llama_may_be_trained_at_another_length_and_a_gpt2_may_not(tmp_path):
    for family, fits in (("llama", True), ("gpt2", False)):
        folder = write(tmp_path / family, random_master(FAMILIES[family], torch.float32))
        model = replace(FAMILIES[family], max_seq_len=8, init_from=folder)
        if fits:
            check_pretrained(model)
        else:
            with pytest.raises(UserError, match=r"give model.max_seq_len=16"):
                check_pretrained(model)


def test_a_folder_that_is_none_is_named_with_the_nearest(tmp_path):
    write(tmp_path / "exported", random_master(FAMILIES["llama"], torch.float32))
    with pytest.raises(UserError, match=r"model.init_from=\S+exportd: must be a folder with config.json .*exported'"):
        check_pretrained(replace(FAMILIES["llama"], init_from=str(tmp_path / "exportd")))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "bert"}, "model_type=bert: must be one of gpt2, llama"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "must be of type default"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: must be silu"),
    ],
)
def test_what_our_model_cannot_hold_is_refused(tmp_path, change, problem):
    folder = write(tmp_path / "out", random_master(FAMILIES["llama"], torch.float32))
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=problem):
        check_pretrained(replace(FAMILIES["llama"], init_from=folder))


def test_where_weights_come_from_is_no_part_of_the_shape():
    assert replace(FAMILIES["llama"], init_from="somewhere") == FAMILIES["llama"]


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.json", '{"model_type": "gpt2"}', "its config.json or index lacks 'n_embd'"),
        ("config.json", "[]", "cannot be read"),
        ("model.safetensors.index.json", '{"weight_map": ', "cannot be read"),
        ("model.safetensors.index.json", "{}", "its config.json or index lacks 'weight_map'"),
    ],
)
def test_a_damaged_folder_is_told(tmp_path, file, content, problem):
    folder = write(tmp_path / "out", random_master(FAMILIES["gpt2"], torch.float32))
    if "index" in file:
        (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / file).write_text(content)
    with pytest.raises(UserError, match=rf"model\.init_from=\S+: .*{problem}"):
        load_pretrained(Transformer(replace(FAMILIES["gpt2"], init_from=folder)))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


GATE = "model.layers.0.mlp.gate_proj.weight"
TOKENS = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("config", "change", "problem"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "quantization_config: quantized weights are not read"),
        ({}, {GATE: torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}, f"{GATE}: stored as F8_E4M3, must be one of F64"),
        ({}, {GATE: torch.zeros(2, 2, dtype=torch.int8)}, f"{GATE}: stored as I8, .* quantized weights are not read"),
        ({}, {GATE + "_scale": torch.ones(1)}, f"{GATE}_scale: a LlamaForCausalLM of this config.json has no such"),
        ({}, {"model.layers.0.self_attn.q_proj.bias": torch.ones(12)}, "q_proj.bias: a LlamaForCausalLM of this"),
        ({"embedding_multiplier": 12.0}, {}, "embedding_multiplier=12.0: is not read, and may change"),
        ({"sliding_window": 4, "mup": True}, {}, "sliding_window=4: is not read"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, {}, "partial_rotary_factor must be 1"),
    ],
)
def test_what_is_not_read_is_refused_by_name_before_anything_is_loaded(tmp_path, config, change, problem):
    folder = write(tmp_path / "out", random_master(FAMILIES["llama"], torch.float32))
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    change_weights(tmp_path / "out", lambda state: state.update(change))
    with pytest.raises(UserError, match=rf"model\.init_from=\S+: .*{problem}"):
        check_pretrained(replace(FAMILIES["llama"], init_from=folder))


def test_weights_that_are_not_finite_are_named(tmp_path):
    folder = write(tmp_path / "out", random_master(FAMILIES["llama"], torch.float32))
    change_weights(tmp_path / "out", lambda state: state[GATE][0].fill_(float("nan")))
    with pytest.raises(UserError, match=rf"{GATE}: holds values that are not finite"):
        started(FAMILIES["llama"], folder)


def test_settings_that_change_nothing_are_passed_over(tmp_path):
    folder = write(tmp_path / "out", random_master(FAMILIES["llama"], torch.float32))
    file = tmp_path / "out" / "config.json"
    harmless = {"torch_dtype": "bfloat16", "bos_token_id": 1, "attention_dropout": 0.1, "sliding_window": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **harmless}))
    check_pretrained(replace(FAMILIES["llama"], init_from=folder))
