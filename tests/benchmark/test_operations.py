"""A step's operations are counted exactly, and by the phases that a reader expects."""

import json
from dataclasses import replace

import pytest
import torch

from est_cli.benchmark.__main__ import main as benchmark_main
from est_cli.benchmark.arguments import parser, to_case
from est_cli.benchmark.operations import Operations, count_operations


def case(*arguments: str):
    return to_case(parser().parse_args(arguments))


@pytest.mark.parametrize("model", ["gpt2", "tinyllama"])
def test_the_command_prints_the_counts_of_every_stage(monkeypatch, capsys, model):
    monkeypatch.setattr("sys.argv", ["benchmark", "--count-operations", "--model", model, "--format", "json"])
    benchmark_main()
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
