"""What `make gpu` measures: that it runs to its end on a CPU, and that a machine that is taken away costs one row."""

import json
from dataclasses import replace

import pytest
import torch

from est_cli.benchmark import gpu
from est_cli.benchmark.gpu import Machine, Row, as_markdown, read_rows, rows, run
from est_cli.benchmark.kernels import OPERATIONS, SETS, all_checks, check_adamw
from est_cli.kernels.dispatch import TORCH

ROWS = {row.name: row for row in rows()}
THREE = [Row(f"trace {name}", lambda here: []) for name in "abc"]


@pytest.fixture
def here(tmp_path):
    return Machine("cpu", True, 1, tmp_path)


class Taken(list):
    """The rows that were measured, in order; those of `failing` fail."""

    failing = ()

    def __call__(self, row, here, seconds):
        self.append(row.name)
        return {"error": "out of memory"} if row.name in self.failing else {"result": []}


def test_every_kind_of_row_is_measured_on_a_cpu_and_what_needs_a_gpu_is_said_to_be_skipped(here, monkeypatch):
    monkeypatch.setattr(gpu, "measure_roofs", lambda *_: {"copy": 1e10, "fp32": 1e11, "bf16": 2e11})
    monkeypatch.setattr("est_cli.benchmark.measure.peak_in_own_process", lambda case, index: 1 << 20)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)  # no transformers
    others = ("compiled", "operation pack tinyllama", "operation adamw gpt2", "operation loss tinyllama", "trace")
    asked = [row for name, row in ROWS.items() if not any(part in name for part in others)]
    said = []
    in_this_process = lambda row, here, seconds: {"result": json.loads(json.dumps(row.measure(here)))}  # noqa: E731
    assert run(asked, here, 5, said.append, in_this_process)
    records = {record["row"]: record for record in read_rows(here.folder / "rows.jsonl")}
    skipped = {name for name, record in records.items() if "skipped" in record}
    assert skipped == {name for name in records if "triton" in name or name.startswith("check")}
    text = (here.folder / "results.md").read_text()
    for part in ("tiny sizes", "| gpt2 eager | 3 |", "| tinyllama eager | 1 |", "adamw tinyllama stage 2 freeze",
                 "10 GB/s", "- steps gpt2 triton: skipped, needs a GPU with triton"):  # fmt: skip
        assert part in text
    assert len(said) == len(asked)


def test_a_row_has_a_process_of_its_own_whose_failure_is_its_result(here, monkeypatch, capsys):
    def in_this_process(module, *arguments, timeout):
        monkeypatch.setattr("sys.argv", [module, *arguments])
        gpu.main()
        return json.loads(capsys.readouterr().out)

    row = ROWS["trace gpt2"]
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "from_own_process", in_this_process)
        assert len(gpu.in_own_process(row, here, 100)["result"]) == 3
    assert len(list(here.folder.glob("trace-gpt2/*.json"))) == 3
    assert "took more than" in gpu.in_own_process(row, here, 0.01)["error"]
    monkeypatch.setattr(gpu.sys, "executable", "false")
    assert gpu.in_own_process(row, here, 100) == {"error": "exit code 1"}


def test_what_failed_is_measured_again_and_a_line_that_was_cut_off_costs_only_its_row(here):
    taken, path, results = Taken(), here.folder / "rows.jsonl", here.folder / "results.md"
    taken.failing = ("trace b",)
    assert not run(THREE, here, 1, print, taken)
    assert taken == ["trace a", "trace b", "trace c"]
    assert "- trace b: failed, out of memory" in results.read_text()
    taken.failing = ()
    path.write_text(path.read_text()[:-9])
    for _ in range(2):
        assert run(THREE, here, 1, print, taken)
    assert taken[3:] == ["trace b", "trace c"]
    assert "failed" not in results.read_text()


@pytest.mark.parametrize("change", ["machine", "code"])
def test_numbers_of_another_machine_or_of_other_code_are_not_mixed_in(here, monkeypatch, change):
    taken = Taken()
    run(THREE, here, 1, print, taken)
    if change == "code":
        monkeypatch.setattr(gpu, "code_hash", lambda: "other")
    run(THREE, here if change == "code" else replace(here, rounds=2), 1, print, taken)
    assert taken[3:] == taken[:3]


def test_no_row_begins_when_the_time_is_over(here):
    taken, said = Taken(), []
    assert not run(THREE, here, 0.1, said.append, taken)
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
