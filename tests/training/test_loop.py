"""The loop over all stages: what it logs, that it can stop and go on, and what it leaves to the stage."""

from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from tiny import GPT2, LLAMA, train_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from est_cli.config import CheckpointConfig, OptimizerConfig
from est_cli.errors import RunFailed
from est_cli.subnet.schedule import stage_at
from est_cli.training.checkpoint import Checkpoints
from tests.training.runs import ARMS, GROWING, STEPS, assert_same_bits, finished, resumed, start, told, train

KEYS = (
    *("step", "tokens", "stage", "train/loss", "train/lr", "train/grad_norm", "val/loss"),
    *("subnet/heads", "subnet/mlp", "subnet/layers"),
    *("flops/step", "flops/total", "flops/full_total", "flops/saved", "flops/saved_blocks"),
    *("perf/step_s", "perf/tokens_per_s", "perf/mfu"),
)
"""The contract of metrics.jsonl."""


def test_every_step_logs_the_contracts_keys(tmp_path):
    _, recorder = finished(train_config(LLAMA, eval_every=4, grad_accum=2, peak_flops=1e12), tmp_path)
    records = recorder.records
    assert all(sorted(record) == sorted(KEYS) for record in records)
    assert [record["step"] for record in records] == list(range(15))
    assert [record["stage"] for record in records] == [1] * 2 + [2] * 5 + [3] * 8
    assert [record["tokens"] for record in records] == [32 * (step + 1) for step in range(15)]
    assert [step for step in range(15) if records[step]["val/loss"] is not None] == [3, 7, 11, 14]
    kept = [tuple(record[f"subnet/{name}"] for name in ("heads", "mlp", "layers")) for record in records]
    assert kept == [(2 / 3, 0.5, 2 / 3)] * 2 + [(2 / 3, 0.5, 1.0)] * 5 + [(1.0, 1.0, 1.0)] * 8
    assert all(a["flops/total"] < b["flops/total"] for a, b in pairwise(records))
    for record in records:
        assert record["perf/tokens_per_s"] == pytest.approx(32 / record["perf/step_s"])
        assert record["perf/mfu"] == pytest.approx(record["flops/step"] / record["perf/step_s"] / 1e12)


def test_log_every_thins_the_records_but_keeps_the_first_the_last_and_evaluations(tmp_path):
    """And without a known peak there is no MFU."""
    _, recorder = finished(train_config(LLAMA, log_every=6, eval_every=4), tmp_path)
    assert [record["step"] for record in recorder.records] == [0, 3, 5, 7, 11, 14]
    assert None not in {record["train/loss"] for record in recorder.records}
    assert {record["perf/mfu"] for record in recorder.records} == {None}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    @cache
    def run(name: str, unsampled: str):
        return finished(ARMS[name].config(unsampled, eval_every=5), tmp_path_factory.mktemp("whole"))

    return run


@pytest.mark.parametrize(
    ("name", "stop_after"), [*product(["three stages"], [1, 2, 6, 7, 11]), *product(GROWING, [3, 6, 7])]
)
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
def test_a_stopped_run_that_goes_on_is_the_uninterrupted_one_bit_for_bit(
    tmp_path, uninterrupted, name, unsampled, stop_after
):
    """In the middle of a stage, at its end, while a plan lasts, and before, at and after a growth."""
    whole, recorder = uninterrupted(name, unsampled)
    config = ARMS[name].config(unsampled, eval_every=5)
    first, before = start(config)
    outcome = train(first, tmp_path, stop_after)
    assert (outcome.status, outcome.steps) == ("stopped", stop_after)
    second, after = resumed(config, tmp_path)
    outcome = train(second, tmp_path)
    assert (outcome.status, outcome.steps) == ("done", STEPS)
    assert told(before, after) == told(recorder)
    assert_same_bits(second, whole)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("name", ["three stages", "heads and neurons", "layer_drop"])
def test_a_masked_run_has_the_losses_and_the_flops_of_the_packed_one(tmp_path, name, precision, tolerance):
    """test_equivalence.py compares the weights of both with the reference."""
    config = ARMS[name].config(precision=precision, eval_every=5)
    packed, masked = (
        finished(replace(config, kernels=kernels), tmp_path / kernels)[1].records for kernels in ("torch", "masked")
    )
    for found, expected in zip(masked, packed, strict=True):
        assert {k: v for k, v in found.items() if "flops" in k} == {k: v for k, v in expected.items() if "flops" in k}
        for key in ("train/loss", "val/loss"):
            assert found[key] == pytest.approx(expected[key], abs=tolerance)


@pytest.mark.parametrize(
    ("name", "grad_accum"),
    [*product(["three stages", "three stages of gpt2"], [1, 2]), *product(GROWING, [1])],
)
def test_the_logged_flops_are_what_the_loops_step_executes(monkeypatch, name, grad_accum):
    """Two steps of every stage, under the contract's conditions: eager, the MATH attention, without evaluation."""
    training, recorder = start(ARMS[name].config(grad_accum=grad_accum))
    monkeypatch.setattr(training, "validate", lambda subnet: 0.0)
    for step in range(STEPS):
        stage = stage_at(training.stages, step)
        if step == stage.first_step:
            training._grow_into(stage)
            subnet = training._build(stage)
        if step >= stage.first_step + 2:
            training._train_step(stage, subnet)
            continue
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            training._train_step(stage, subnet)
        assert counter.get_total_flops() == recorder.records[-1]["flops/step"], f"step {step}"
    assert recorder.records[5]["flops/step"] < recorder.records[-1]["flops/step"]
    assert sum(record["flops/step"] for record in recorder.records) == recorder.records[-1]["flops/total"]


@pytest.mark.parametrize(
    ("at_boundaries", "written", "stay"),
    [(False, [6, 12, 15], [15]), (True, [2, 6, 7, 12, 15], [2, 7, 15])],
    ids=["every six steps", "and at boundaries"],
)
def test_checkpoints_come_at_their_steps_and_at_the_end_and_those_of_boundaries_stay(
    tmp_path, at_boundaries, written, stay
):
    config = train_config(GPT2, checkpoint_every=6, save_final="weights")
    config = replace(config, checkpoint=CheckpointConfig(keep=1, at_boundaries=at_boundaries))
    training, recorder = start(config)
    training.run(Checkpoints(tmp_path, keep=1, lasting=config.lasting_checkpoints), stopping=lambda: False)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == stay
    assert [int(message.split("step-")[1]) for message in recorder.messages] == written
    assert not Checkpoints(tmp_path).newest(pytest.fail).can_resume


@pytest.mark.parametrize("kernels", ["torch", "masked"])
def test_bf16_trains_fp32_weights(tmp_path, kernels):
    config = train_config(LLAMA, optimizer=OptimizerConfig(lr=1e-2), max_steps=30, batch_size=8)
    in_bf16 = replace(config, kernels=kernels, trainer=replace(config.trainer, precision="bf16"))
    training, recorder = finished(in_bf16, tmp_path)
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
    fp32 = finished(config, tmp_path / "fp32")[1].records
    assert fp32[-1]["train/loss"] < fp32[0]["train/loss"] - 0.1, "far enough from the start to tell runs apart"
    for a, b in zip(recorder.records, fp32, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=0.03)


@pytest.fixture
def full_at(monkeypatch):
    """Call with steps: the disk takes no checkpoint of these."""
    complete = Checkpoints.complete

    def fill(steps: range) -> None:
        def sometimes_full(self, step, *rest):
            if step in steps:
                raise OSError(28, "No space left on device")
            return complete(self, step, *rest)

        monkeypatch.setattr(Checkpoints, "complete", sometimes_full)

    return fill


def test_a_disk_that_fills_up_costs_no_step_and_is_told_once(tmp_path, full_at):
    """Checkpoints 4 to 12 find no room; the run goes on, and the last one is written again."""
    full_at(range(4, 13))
    _, recorder = finished(train_config(LLAMA, checkpoint_every=2, save_final="full"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000014", "step-00000015"]
    assert [message for message in recorder.messages if "No space left" in message] == [
        "the checkpoint of step 4 could not be written (No space left on device); step 2's stays; training goes on"
    ]
    assert told(recorder) == told(finished(train_config(LLAMA), tmp_path / "whole")[1])


@pytest.mark.parametrize("stop_after", [None, 8], ids=["at its end", "when it is asked to stop"])
def test_a_run_whose_last_checkpoint_finds_no_room_is_not_done(tmp_path, full_at, stop_after):
    training, _ = start(train_config(LLAMA, checkpoint_every=6, save_final="full"))
    full_at(range(7, 16))
    with pytest.raises(RunFailed, match=r"No space left on device\); step 6's stays$"):
        train(training, tmp_path, stop_after)
    assert Checkpoints(tmp_path).newest(pytest.fail).step == 6


def test_a_run_that_was_killed_after_its_last_checkpoint_is_done_without_writing_it_again(tmp_path, monkeypatch):
    """Between the final checkpoint and the summary; weights alone suffice then."""
    config = train_config(LLAMA, checkpoint_every=6, save_final="weights")
    finished(config, tmp_path)
    again, recorder = start(config)
    again.restore(Checkpoints(tmp_path).to_resume(15, pytest.fail))
    monkeypatch.setattr(Checkpoints, "save", lambda *_: pytest.fail("nothing is new"))
    outcome = train(again, tmp_path)
    assert (outcome.status, outcome.steps, recorder.records) == ("done", 15, [])
    assert again.progress.val_loss is not None
