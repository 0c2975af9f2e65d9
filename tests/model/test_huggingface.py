"""Hugging Face's names and layouts, both ways: nothing is lost, and names and shapes are those of the class."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, random_master

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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_class(family, tied, bias):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config, tensors = to_huggingface(random_master(replace(FAMILIES[family], tie_embeddings=tied, bias=bias)))
    peer = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    expected = {name: parameter.shape for name, parameter in peer.named_parameters()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


def test_a_missing_tensor_is_named():
    config, tensors = to_huggingface(random_master(FAMILIES["llama"]))
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(UserError, match=r"no tensor layers.1.self_attn.k_proj.weight"):
        from_huggingface(config, tensors)


def test_an_untied_head_must_be_there():
    config, tensors = to_huggingface(random_master(FAMILIES["llama"]))
    del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"no tensor lm_head.weight, and config.json does not tie it"):
        from_huggingface(config, tensors)
