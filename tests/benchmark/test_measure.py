"""What est-bench and make bench report: ratios within a round, against the full model and against the peer."""

import os

import numpy as np
import pytest
from tiny import FAMILIES

from est_cli.benchmark import measure as module
from est_cli.benchmark.case import Case
from est_cli.benchmark.goals import beside_goal, steps
from est_cli.benchmark.measure import (
    in_own_process,
    interleaved,
    markdown,
    measure,
    peak_of_stage,
    progress_line,
    stage_cells,
)
from est_cli.benchmark.steps import PHASES

NAMES = {"gpt2": "transformers GPT2LMHeadModel", "llama": "transformers LlamaForCausalLM"}


def case(family: str = "gpt2", **options) -> Case:
    return Case(FAMILIES[family], batch_size=2, seq_len=8, **options)


class SlowingMachine:
    """Steps that take their FLOPs' time, on a machine that halves its speed every round."""

    def __init__(self, case: Case):
        self.flops = [cost.total for cost in case.flops]
        self.calls = 0

    def step(self, index: int) -> dict[str, float]:
        round_number, self.calls = self.calls // len(self.flops), self.calls + 1
        share = self.flops[index] * 2.0**round_number / len(PHASES)
        return dict.fromkeys(PHASES, share)


def test_time_that_follows_flops_is_an_efficiency_of_one_on_a_machine_that_slows_down(monkeypatch):
    monkeypatch.setattr(module, "Stepper", SlowingMachine)
    result = measure(case(), rounds=5, warmup=1, memory=False)
    for stage in result["stages"][:-1]:
        assert stage["efficiency"] == pytest.approx(1.0)
        np.testing.assert_allclose(stage["efficiency_quartiles"], 1.0)
        assert stage["time_ratio"] == pytest.approx(stage["flops_ratio"])
    assert result["stages"][-1]["efficiency"] is None
    table = markdown([stage_cells(stage) for stage in result["stages"]])
    assert len(table) == 5 and "| 1.00 [1.00, 1.00] |" in table[2] and table[4].startswith("| 3 |")


@pytest.mark.parametrize(("family", "precision"), [("gpt2", "fp32"), ("gpt2", "bf16"), ("llama", "bf16")])
def test_every_stage_and_the_peer_are_timed(family, precision):
    pytest.importorskip("transformers")
    found = measure(case(family, precision=precision), 2, 1, "transformers", memory=False)
    assert [stage["stage"] for stage in found["stages"]] == [1, 2, 3]
    assert all(set(stage["phases"]) == set(PHASES) and stage["step_s"] > 0 for stage in found["stages"])
    assert found["against"]["name"] == NAMES[family]
    assert "eager" in found["against"]["setting"]


def test_calls_take_turns_and_the_time_that_is_left_is_told(monkeypatch, capsys):
    turns, clock = [], iter(range(0, 1000, 5))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    calls = {name: lambda name=name: turns.append(name) or len(turns) for name in "ab"}
    assert interleaved(calls, 2, 1, progress_line("group")) == {"a": [3, 5], "b": [4, 6]}
    assert turns == ["a", "b"] * 3
    said = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert said[:3] == ["group: 0 of 6, begins", "group: 1 of 6, about 0:25 left", "group: 2 of 6, about 0:20 left"]
    assert said[-1] == "group: 6 of 6, took 0:30"


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(1.0, True, True), (0.99, True, False), (1.0, False, True), (1.01, False, False)]
)
def test_a_goal_is_met_on_its_own_side_of_the_number(value, at_least, met):
    row = beside_goal("ratio", "here", value, "", 1.0, at_least)
    assert markdown([row])[2].endswith(f"| {'≥' if at_least else '≤'} 1 | {'met' if met else 'not met'} |")


def test_goals_read_the_measured_result(monkeypatch):
    stages = [
        {"stage": 1, "efficiency": 1.04, "efficiency_quartiles": [1.0, 1.1]},
        {"stage": 2, "efficiency": 0.93, "efficiency_quartiles": [0.9, 1.0]},
        {"stage": 3, "efficiency": None, "efficiency_quartiles": None},
    ]
    peer = {"name": "theirs", "setting": "eager", "time_ratio": 0.9, "time_ratio_quartiles": [0.8, 1.0]}
    monkeypatch.setattr("est_cli.benchmark.goals.measure", lambda *_, **__: {"stages": stages, "against": peer})
    first, second, full = steps(case(), "GPT-2", 1, None)
    assert [row[""] for row in (first, second, full)] == ["met", "not met", "met"]
    assert (second["measured"], second["where"]) == ("0.93 [0.90, 1.00]", "GPT-2 fp32")


def test_a_process_of_its_own_gives_a_result_or_says_that_it_was_killed():
    assert in_own_process(peak_of_stage, case(), 0) > 1 << 20
    with pytest.raises(RuntimeError, match="was killed"):
        in_own_process(os._exit, 3)
