"""A run starts from a Hugging Face folder: our weights come back bit for bit, others as transformers reads them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, random_batch, random_master, snapshot, train_config
from torch.testing import assert_close

from est_cli.errors import UserError
from est_cli.model.huggingface import to_huggingface
from est_cli.model.transformer import Transformer
from est_cli.training.pretrained import check_pretrained, load_pretrained
from tests.training.runs import start

GPT2, LLAMA = FAMILIES["gpt2"], FAMILIES["llama"]


def write(folder: Path, config) -> Transformer:
    """A model, and its export in the folder, without the tokenizer."""
    model = random_master(config, torch.float32)
    settings, tensors = to_huggingface(model)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return model


def started(config, folder: Path) -> Transformer:
    model = Transformer(replace(config, init_from=str(folder)))
    load_pretrained(model)
    return model


def check(config, folder: Path) -> None:
    check_pretrained(replace(config, init_from=str(folder)))


def set_config(folder: Path, **change) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def set_weights(folder: Path, change) -> None:
    """`change` gets the tensors by name, and returns the new ones."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_in_again_is_the_identity(folder, family, bias, tied):
    model = write(folder, replace(FAMILIES[family], bias=bias, tie_embeddings=tied))
    training, _ = start(train_config(replace(model.config, init_from=str(folder))))
    assert_close(snapshot(training.model), snapshot(model), rtol=0, atol=0)
    assert training.config.model == model.config, "where weights come from is no part of the shape"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saved_gives_the_logits_that_transformers_gives(folder, family):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config, _ = to_huggingface(random_master(FAMILIES[family], torch.float32))
    peer = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    peer.save_pretrained(folder)
    inputs, _ = random_batch(FAMILIES[family])
    ours = started(FAMILIES[family], folder)
    with torch.no_grad():
        assert (ours.logits(inputs) - peer(inputs).logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_vocabulary_rows_have_the_mean_logit(folder, family):
    model = write(folder, FAMILIES[family])
    padded = started(replace(model.config, vocab_size=32), folder)
    inputs, _ = random_batch(model.config)
    logits = padded.logits(inputs)
    assert_close(logits[..., :29], model.logits(inputs))
    assert_close(logits[..., 29:], logits[..., :29].mean(-1, keepdim=True).expand(-1, -1, 3))


def test_names_of_the_first_gpt2_files_are_read(folder):
    model = write(folder, GPT2)
    mask = {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    set_weights(folder, lambda tensors: mask | {n.removeprefix("transformer."): t for n, t in tensors.items()})
    assert_close(snapshot(started(GPT2, folder)), snapshot(model), rtol=0, atol=0)


def test_weights_in_several_files_and_half_precision_are_read(folder):
    model = write(folder, LLAMA)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    files = {name: "a.safetensors" if number < 5 else "b.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name, own in files.items() if own == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    expected = {name: tensor.bfloat16().float() for name, tensor in snapshot(model).items()}
    assert_close(snapshot(started(LLAMA, folder)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "changes", "given"),
    [
        ("llama", {"n_layers": 4, "d_ff": 8, "vocab_size": 28, "rope_theta": 500.0, "bias": True},
         ["n_layers=3", "d_ff=16", "bias=false", "vocab_size=29", "rope_theta=10000.0"]),
        ("gpt2", {"bias": False}, ["bias=true"]),
        ("gpt2", {"max_seq_len": 8}, ["max_seq_len=16"]),
        ("llama", {"max_seq_len": 8}, []),
    ],
    ids=["every key", "biases that are not zero", "learned positions are weights", "rotary ones are not"],
)  # fmt: skip
def test_every_differing_key_is_named_with_the_override_to_paste(folder, family, changes, given):
    write(folder, FAMILIES[family])
    problems = []
    try:
        check(replace(FAMILIES[family], **changes), folder)
    except UserError as error:
        problems = error.problems
    assert [problem.rpartition("; give ")[2] for problem in problems] == [f"model.{value}" for value in given]


def test_a_folder_that_is_none_is_named_with_the_nearest(tmp_path):
    write(tmp_path / "exported", LLAMA)
    with pytest.raises(UserError, match=r"model.init_from=\S+exportd: must be a folder with config.json .*exported'"):
        check(LLAMA, tmp_path / "exportd")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.json", '{"model_type": "gpt2"}', "its config.json or index lacks 'n_embd'"),
        ("config.json", "[]", "cannot be read"),
        ("model.safetensors.index.json", '{"weight_map": ', "cannot be read"),
        ("model.safetensors.index.json", "{}", "its config.json or index lacks 'weight_map'"),
    ],
)
def test_a_damaged_folder_is_told(folder, file, content, problem):
    write(folder, GPT2)
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=rf"model\.init_from=\S+: .*{problem}"):
        started(GPT2, folder)


GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("config", "change", "problem"),
    [
        ({"model_type": "bert"}, {}, "model_type=bert: must be one of gpt2, llama"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, {}, "must be of type default"),
        ({"hidden_act": "gelu"}, {}, "hidden_act=gelu: must be silu"),
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
def test_what_our_model_cannot_hold_is_refused_by_name_before_anything_is_loaded(folder, config, change, problem):
    write(folder, LLAMA)
    set_config(folder, **config)
    set_weights(folder, lambda tensors: tensors | change)
    with pytest.raises(UserError, match=rf"model\.init_from=\S+: .*{problem}"):
        check(LLAMA, folder)


def test_weights_that_are_not_finite_are_named(folder):
    write(folder, LLAMA)
    set_weights(folder, lambda tensors: tensors | {GATE: torch.full_like(tensors[GATE], float("nan"))})
    with pytest.raises(UserError, match=rf"{GATE}: holds values that are not finite"):
        started(LLAMA, folder)


def test_settings_that_change_nothing_are_passed_over(folder):
    write(folder, LLAMA)
    set_config(folder, torch_dtype="bfloat16", bos_token_id=1, attention_dropout=0.1, sliding_window=None)
    check(LLAMA, folder)
