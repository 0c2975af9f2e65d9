"""A step's operations are counted exactly, and by the phases that a reader expects."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import GPT2

from est_cli.benchmark.__main__ import main, parser, to_case
from est_cli.benchmark.case import Case
from est_cli.benchmark.steps import Operations, Stepper, count_operations
from est_cli.subnet.schedule import StageSpec


def case(*arguments: str) -> Case:
    return to_case(parser().parse_args(arguments))


@pytest.mark.parametrize("kernels", ["auto", "masked"])
@pytest.mark.parametrize("compiles", [True, False])
def test_every_stage_is_compiled_where_the_trainer_compiles(monkeypatch, kernels, compiles):
    compiled = []
    monkeypatch.setattr("est_cli.model.transformer.Transformer.compile_blocks", lambda model: compiled.append(model))
    stages = (StageSpec(None, 0.5, 0.5, 0.5), StageSpec())
    stepper = Stepper(Case(GPT2, stages=stages, batch_size=2, seq_len=8, compile=compiles, kernels=kernels))
    for stage in (0, 1, 0):
        stepper.step(stage)
    assert len(compiled) == (2 if compiles else 0)


@pytest.mark.parametrize("model", ["gpt2", "tinyllama"])
def test_the_command_prints_the_counts_of_every_stage(monkeypatch, capsys, model):
    monkeypatch.setattr("sys.argv", ["benchmark", "--count-operations", "--model", model, "--format", "json"])
    main()
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["stage"] for stage in stages] == [1, 2, 3]
    assert all(set(stage) == {"stage", "pack", "forward_backward", "update"} for stage in stages)
    assert all(type(count) is int for stage in stages for count in stage.values())
    assert stages[2]["pack"] == 0, "in fp32 the full model trains in its own place"
    half, whole = (stage["forward_backward"] for stage in stages[:2])
    assert half < 0.6 * whole, "half of the layers"


def test_views_are_no_operations_and_everything_else_is_one():
    with Operations() as operations:
        x = torch.ones(2, 3)
        x.t().view(3, 2)[1:].unsqueeze(0).detach()
        torch._foreach_mul_([x, x], 2.0)
        x.sum().item()
    assert operations.names == ["aten::ones", "aten::_foreach_mul_.Scalar", "aten::sum", "aten::_local_scalar_dense"]


def test_counts_depend_on_no_width():
    narrow = case("--model", "nano")
    wide = replace(narrow, model=replace(narrow.model, d_model=64, head_dim=16, d_ff=96, vocab_size=128))
    assert count_operations(wide) == count_operations(narrow)


@pytest.mark.parametrize(
    ("model", "precision", "unsampled", "pack", "update"),
    [
        ("gpt2", "fp32", "zero_grad", [5, 5, 0], [34, 32, 22]),
        ("gpt2", "bf16", "zero_grad", [12, 10, 1], [29, 28, 22]),
        ("tinyllama", "fp32", "zero_grad", [3, 3, 0], [30, 27, 22]),
        ("tinyllama", "bf16", "zero_grad", [8, 6, 1], [27, 25, 22]),
        ("gpt2", "fp32", "freeze", [5, 5, 0], None),
    ],
)
def test_pack_and_update_take_few_operations_at_any_depth(model, precision, unsampled, pack, update):
    """At most 20 to pack, and at most 40 for norm, clip and AdamW if every row has taken equally many steps."""
    measured = case("--model", model, "--precision", precision, "--optimizer", json.dumps({"unsampled": unsampled}))
    shallow, deep = (
        count_operations(replace(measured, model=replace(measured.model, n_layers=n_layers)))["stages"]
        for n_layers in (4, 7)
    )
    for stages in (shallow, deep):
        assert [stage["pack"] for stage in stages] == pack
        assert [stage["update"] for stage in stages] == (update or [stage["update"] for stage in shallow])
