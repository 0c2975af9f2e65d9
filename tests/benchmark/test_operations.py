"""A step's operations are counted exactly, and by the phases that a reader expects."""

import json
from dataclasses import replace

import pytest
import torch

from est_cli.benchmark.__main__ import main, parser, to_case
from est_cli.benchmark.operations import Operations, count_operations


def case(*arguments: str):
    return to_case(parser().parse_args(arguments))


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


EXACT = {
    ("gpt2", "fp32"): ([5, 5, 0], [34, 32, 22]),
    ("gpt2", "bf16"): ([12, 10, 1], [29, 28, 22]),
    ("tinyllama", "fp32"): ([3, 3, 0], [30, 27, 22]),
    ("tinyllama", "bf16"): ([8, 6, 1], [27, 25, 22]),
}


def at_depths(measured) -> list[dict[str, list[int]]]:
    """Counts of each phase by stage, of 4 and of 9 layers."""
    found = []
    for n_layers in (4, 9):
        stages = count_operations(replace(measured, model=replace(measured.model, n_layers=n_layers)))["stages"]
        found.append({phase: [stage[phase] for stage in stages] for phase in ("pack", "update")})
    return found


@pytest.mark.parametrize(("model", "precision"), EXACT)
def test_pack_and_update_take_few_operations_at_any_depth(model, precision):
    """At most 20 to pack, and at most 40 for norm, clip and AdamW."""
    pack, update = EXACT[model, precision]
    assert at_depths(case("--model", model, "--precision", precision)) == [{"pack": pack, "update": update}] * 2


@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
def test_the_update_does_not_grow_with_the_layers_for_either_treatment_of_other_rows(unsampled):
    shallow, deep = at_depths(case("--model", "gpt2", "--optimizer", json.dumps({"unsampled": unsampled})))
    assert shallow["update"] == deep["update"]
