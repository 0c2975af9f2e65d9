"""est-plan: what a run would cost."""

import shlex

import pytest

from tests.commands.cli import call


@pytest.mark.parametrize(
    ("experiment", "blocks", "whole"), [("gpt2_est", 0.26667, 0.1943), ("tinyllama_est", 0.25, 0.2366)]
)
def test_the_papers_savings_come_out(experiment, blocks, whole, tmp_path):
    plan = call("est-plan", f"experiment={experiment}", "format=json", cwd=tmp_path).json
    assert plan["saved_blocks"] == pytest.approx(blocks, abs=1e-5)
    assert plan["saved"] == pytest.approx(whole, abs=1e-4)


def test_json_has_the_contracts_keys_and_no_file_is_left(tmp_path):
    plan = call("est-plan", "format=json", cwd=tmp_path).json
    assert list(tmp_path.iterdir()) == []
    assert {"params", "steps", "saved", "saved_blocks", "memory_bytes", "stages"} <= plan.keys()
    for stage in plan["stages"]:
        assert {"stage", "first_step", "last_step", "rates", "flops_per_step", "saved"} <= stage.keys()
    assert [(s["first_step"], s["last_step"]) for s in plan["stages"]] == [(0, 132), (133, 466), (467, 999)]


def test_with_m_every_plan_is_printed_and_no_file_is_left(tmp_path):
    done = call("est-plan", "-m", "seed=0,1", "format=json", cwd=tmp_path)
    assert (done.code, len(done.out.splitlines())) == (0, 2), done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "fits"), [("80GiB", False), ("300GB", True)])
def test_whether_a_run_fits_into_a_gpu(size, fits, tmp_path):
    model = ("model=llama_7b", "trainer=ddp", "trainer.devices=64", f"device_memory={size}")
    plan = call("est-plan", *model, "format=json", cwd=tmp_path).json
    assert plan["fits"] is fits
    sent = [stage["sent_bytes_per_step"] for stage in plan["stages"]]
    assert sent[-1] == pytest.approx(8 * plan["params"] * 63 / 64, rel=1e-3)
    said = " ".join(call("est-plan", *model, cwd=tmp_path).out.split())
    assert ("fits, " in said) is fits
    assert ("trainer.batch_size=1 trainer.recompute=block trainer=fsdp: " in said) is not fits
    assert all(name in said for name in (" ddp ", " fsdp ", " hsdp, 8 a machine "))


@pytest.mark.parametrize(("trainer", "fits"), [("fsdp", True), ("ddp", False)])
def test_fsdp_makes_room(trainer, fits, tmp_path):
    run = ("model=llama_7b", f"trainer={trainer}", "trainer.devices=64", "trainer.batch_size=1")
    plan = call("est-plan", *run, "trainer.recompute=block", "device_memory=80GiB", "format=json", cwd=tmp_path).json
    assert plan["fits"] is fits


@pytest.mark.parametrize(
    "schedule",
    ["scheduler=three_stage", "scheduler=ramp",
     "scheduler.stages=[{end: 0.3, heads: 0.5, mlp: 0.25}, {end: 0.5, mlp: 0.5}, {}]"],
)  # fmt: skip
def test_solved_boundaries_reach_the_target_when_they_are_pasted(tmp_path, schedule):
    """The last two have boundaries without a key of their own; the three-stage schedule's keys would reach nothing."""
    run = (schedule, "trainer.max_steps=100000")
    solved = call("est-plan", *run, "target_saved_blocks=0.1", "format=json", cwd=tmp_path).json
    pasted = call("est-plan", *run, *solved["overrides"], "format=json", cwd=tmp_path).json
    assert pasted["saved_blocks"] == pytest.approx(0.1, abs=1e-4)
    assert pasted["saved_blocks"] == pytest.approx(solved["saved_blocks"])
    printed = call("est-plan", *run, "target_saved_blocks=0.1", cwd=tmp_path).out.splitlines()[0]
    assert shlex.split(printed) == solved["overrides"]


def test_requested_and_effective_rates_are_both_shown(tmp_path):
    plan = call("est-plan", "sampling.heads=0.3", "format=json", cwd=tmp_path).json
    assert plan["stages"][0]["rates"]["heads"] == 0.3
    assert plan["stages"][0]["effective_rates"]["heads"] == 0.5  # one of two key/value groups
