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


EXACT = {
    ("gpt2", "fp32"): ([5, 5, 0], [34, 32, 22]),
    ("gpt2", "bf16"): ([12, 10, 1], [29, 28, 22]),
    ("tinyllama", "fp32"): ([3, 3, 0], [30, 27, 22]),
    ("tinyllama", "bf16"): ([8, 6, 1], [27, 25, 22]),
}


@pytest.mark.parametrize(("model", "precision"), EXACT)
def test_pack_and_update_take_few_operations_whatever_the_depth(model, precision):
    """At most 20 to pack, and at most 40 for norm, clip and AdamW."""
    shallow = case("--model", model, "--precision", precision)
    shallow = replace(shallow, model=replace(shallow.model, n_layers=4))
    found = [
        [[stage[phase] for stage in count_operations(measured)["stages"]] for phase in ("pack", "update")]
        for measured in (shallow, replace(shallow, model=replace(shallow.model, n_layers=9)))
    ]
    assert found == [list(EXACT[model, precision])] * 2


@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
def test_the_update_does_not_grow_with_the_layers_whatever_happens_to_rows_that_are_not_sampled(unsampled):
    counts = []
    for n_layers in (4, 9):
        measured = case("--model", "gpt2", "--optimizer", json.dumps({"unsampled": unsampled}))
        measured = replace(measured, model=replace(measured.model, n_layers=n_layers))
        counts.append([stage["update"] for stage in count_operations(measured)["stages"]])
    assert counts[0] == counts[1]
