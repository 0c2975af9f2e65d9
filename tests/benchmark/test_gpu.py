"""What `make gpu` measures: that it runs to its end on a CPU, and that a machine that is taken away costs one row."""

import json
from dataclasses import replace

import pytest
import torch

from est_cli.benchmark import gpu
from est_cli.benchmark.gpu import ROWS, Machine, as_markdown, run
from est_cli.benchmark.kernels import OPERATIONS, SETS, all_checks, check_adamw
from est_cli.kernels.dispatch import TORCH

THREE = [f"trace {name}" for name in "abc"]


@pytest.fixture
def here(tmp_path):
    return Machine("cpu", True, 1, tmp_path)


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The rows that were measured, in order; `trace b` fails the first time."""
    rows = []

    def outcome(row, here, seconds):
        rows.append(row)
        return {"error": "out of memory"} if row == "trace b" and rows.count(row) == 1 else {"result": []}

    monkeypatch.setattr(gpu, "outcome", outcome)
    return rows


def test_every_kind_of_row_is_measured_on_a_cpu_and_what_needs_a_gpu_is_said_to_be_skipped(here, monkeypatch):
    monkeypatch.setattr(gpu, "measure_roofs", lambda *_: {"copy": 1e10, "fp32": 1e11, "bf16": 2e11})
    monkeypatch.setattr(gpu, "in_own_process", lambda function, *arguments, timeout: function(*arguments))
    monkeypatch.setattr("est_cli.benchmark.measure.in_own_process", lambda function, *arguments: 1 << 20)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)  # no transformers
    others = ("compiled", "operation pack tinyllama", "operation adamw gpt2", "operation loss tinyllama")
    asked = [row for row in ROWS if not any(part in row for part in others)]
    said = []
    assert run(asked, here, 5, said.append)
    records = map(json.loads, (here.folder / "rows.jsonl").read_text().splitlines())
    skipped = {record["row"] for record in records if "skipped" in record}
    assert skipped == {row for row in asked if "triton" in row or row.startswith("check")}
    text = (here.folder / "results.md").read_text()
    for part in ("tiny sizes", "| gpt2 eager | 3 |", "| tinyllama eager | 1 |", "adamw tinyllama stage 2 freeze",
                 "10 GB/s", "- steps gpt2 triton: skipped, needs a GPU with triton"):  # fmt: skip
        assert part in text
    assert len(said) == len(asked)
    assert len(list(here.folder.glob("trace-gpt2/*.json"))) == 3


def test_a_row_that_fails_in_its_process_has_an_error(here, monkeypatch):
    monkeypatch.setitem(ROWS, "too small", int)
    assert "int() argument must be" in gpu.outcome("too small", here, 100)["error"]
    assert gpu.outcome("too small", here, 0.01) == {"error": "took more than 0 s"}


def test_what_failed_is_measured_again(here, taken):
    results = here.folder / "results.md"
    assert not run(THREE, here, 1, print)
    assert "- trace b: failed, out of memory" in results.read_text()
    for _ in range(2):
        assert run(THREE, here, 1, print)
    assert taken == [*THREE, "trace b"]
    assert "failed" not in results.read_text()


@pytest.mark.parametrize("change", ["machine", "code"])
def test_numbers_of_another_machine_or_of_other_code_are_not_mixed_in(here, taken, monkeypatch, change):
    run(THREE, here, 1, print)
    if change == "code":
        monkeypatch.setattr(gpu, "code_hash", lambda: "other")
    run(THREE, here if change == "code" else replace(here, rounds=2), 1, print)
    assert taken[3:] == taken[:3]


def test_no_row_begins_when_the_time_is_over(here, taken):
    said = []
    assert not run(THREE, here, 0.1, said.append)
    assert taken == [] and "the same command continues" in said[-1]


def test_a_kernel_that_is_wrong_is_found_and_told():
    def off(moves, clip):
        TORCH.adamw_step(moves, clip)
        moves[0].parameter.add_(1e-3)

    found = list(check_adamw(TORCH._replace(adamw_step=off), SETS["odd"], False, None, torch.device("cpu")))
    wrong = [vars(one) for one in found if not one.passed]
    assert [one["name"] for one in wrong] == ["parameter"]
    record = {"row": "check adamw", "result": {"checks": 3, "failed": wrong}}
    assert "parameter 0.003" in as_markdown("x", [record])
    for operation in OPERATIONS:
        assert all(check.passed for check in all_checks(operation, TORCH, torch.device("cpu"), [torch.float32]))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [([], "torch sees no GPU here"), (["--rounds", "0"], "--rounds=0"), (["--only", "steps"], "invalid choice")],
)
def test_bad_arguments_are_told(monkeypatch, capsys, arguments, problem):
    monkeypatch.setattr("sys.argv", ["gpu", *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        gpu.main()
    assert exit.value.code == 2 and problem in capsys.readouterr().err
