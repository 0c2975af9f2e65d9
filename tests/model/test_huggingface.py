"""Hugging Face's classes, both ways: nothing is lost, and the class computes what our model computes."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, GPT2, LLAMA, random_batch, random_master

from est_cli.errors import UserError
from est_cli.model.huggingface import from_huggingface, to_huggingface


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_identity(family, tied):
    model = random_master(replace(FAMILIES[family], tie_embeddings=tied, rope_theta=500.0))
    config, state = from_huggingface(*to_huggingface(model))
    expected = dict(model.named_parameters())
    assert config == (model.config if family == "llama" else replace(model.config, rope_theta=10000.0))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "config",
    [
        GPT2,
        replace(GPT2, tie_embeddings=False, norm_eps=1e-3),
        replace(GPT2, bias=False),
        LLAMA,
        replace(LLAMA, bias=True),
        replace(LLAMA, n_kv_heads=6, tie_embeddings=True, norm_eps=1e-3),
        replace(LLAMA, n_kv_heads=1, head_dim=8, rope_theta=500.0),
    ],
    ids=["gpt2", "gpt2-untied", "gpt2-no-bias", "llama", "llama-bias", "llama-mha-tied", "llama-one-kv-head"],
)
def test_the_class_has_our_names_and_shapes_and_gives_our_logits(config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = random_master(config, torch.float32)
    theirs_config, tensors = to_huggingface(ours)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**theirs_config)).eval()
    assert tensors.keys() == dict(theirs.named_parameters()).keys()
    theirs.load_state_dict({"lm_head.weight": ours.head_weight.detach(), **tensors}, strict=True)
    inputs, targets = random_batch(config, length=config.max_seq_len)
    with torch.no_grad():
        expected = theirs(input_ids=inputs).logits
        logits = ours.logits(inputs)
        loss = ours(inputs, targets)
    assert logits.abs().max() > 1, "logits far from zero, or the comparison says little"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected.mT, targets), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "no tensor layers.1.self_attn.k_proj.weight"),
        ("lm_head.weight", "no tensor lm_head.weight, and config.json does not tie it"),
    ],
)
def test_a_missing_tensor_is_named(name, problem):
    config, tensors = to_huggingface(random_master(FAMILIES["llama"]))
    del tensors[name]
    with pytest.raises(UserError, match=problem):
        from_huggingface(config, tensors)
