"""The loop over all three stages: what it logs, that it can stop and go on, and what it leaves to the stage."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import FAMILIES, GPT2, LLAMA, RandomTokens, Recorder, snapshot, train_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from est_cli.config import CheckpointConfig, OptimizerConfig, SamplingConfig, TrainConfig
from est_cli.errors import RunFailed
from est_cli.subnet.schedule import stage_at
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import World
from est_cli.training.loop import Training

KEYS = (
    *("step", "tokens", "stage", "train/loss", "train/lr", "train/grad_norm", "val/loss"),
    *("subnet/heads", "subnet/mlp", "subnet/layers"),
    *("flops/step", "flops/total", "flops/full_total", "flops/saved", "flops/saved_blocks"),
    *("perf/step_s", "perf/tokens_per_s", "perf/mfu"),
)
"""The contract of metrics.jsonl."""
CPU = World(torch.device("cpu"))


def start(config: TrainConfig) -> tuple[Training, Recorder]:
    recorder = Recorder()
    return Training(config, RandomTokens(config.model.vocab_size), CPU, [recorder]), recorder


def run(config: TrainConfig, folder) -> tuple[Training, Recorder]:
    training, recorder = start(config)
    training.run(Checkpoints(folder), stopping=lambda: False)
    return training, recorder


def repeatable(records: list[dict]) -> list[dict]:
    """What two runs must agree in: everything but the time it took."""
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]


def test_every_step_logs_the_contracts_keys(tmp_path):
    config = train_config(LLAMA, eval_every=4, grad_accum=2, peak_flops=1e12)
    _, recorder = run(config, tmp_path)
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


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    _, recorder = run(train_config(LLAMA), tmp_path)
    assert {record["perf/mfu"] for record in recorder.records} == {None}


def test_log_every_thins_the_records_but_keeps_the_first_the_last_and_evaluations(tmp_path):
    _, recorder = run(train_config(LLAMA, log_every=6, eval_every=4), tmp_path)
    assert [record["step"] for record in recorder.records] == [0, 3, 5, 7, 11, 14]
    assert None not in {record["train/loss"] for record in recorder.records}


def test_two_runs_of_one_config_agree_in_everything_but_time(tmp_path):
    records = [run(train_config(LLAMA, eval_every=5), tmp_path / name)[1].records for name in "ab"]
    assert repeatable(records[0]) == repeatable(records[1])
    other = run(train_config(LLAMA, eval_every=5, seed=1), tmp_path / "c")[1].records
    assert repeatable(other) != repeatable(records[0])


@pytest.mark.parametrize("stop_after", [1, 2, 6, 7, 11], ids="after-{}".format)
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
def test_a_stopped_run_that_goes_on_is_the_uninterrupted_one_bit_for_bit(tmp_path, unsampled, stop_after):
    """In the middle of a stage, at its end, and while a plan lasts; a fresh object knows nothing but the checkpoint."""
    optimizer = OptimizerConfig(lr=3e-3, unsampled=unsampled)
    config = train_config(LLAMA, SamplingConfig(resample_every=3), optimizer, eval_every=5, save_final="full")
    whole, recorder = run(config, tmp_path / "whole")
    first, before = start(config)
    outcome = first.run(Checkpoints(tmp_path / "parts"), stopping=lambda: first.step == stop_after)
    assert (outcome.status, outcome.steps) == ("stopped", stop_after)
    second, after = start(config)
    second.restore(Checkpoints(tmp_path / "parts").newest(pytest.fail))
    outcome = second.run(Checkpoints(tmp_path / "parts"), stopping=lambda: False)
    assert (outcome.status, outcome.steps) == ("done", 15)
    assert repeatable([*before.records, *after.records]) == repeatable(recorder.records)
    expected = snapshot(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in snapshot(second.model).items())
    files = [Checkpoints(tmp_path / name).newest(pytest.fail).folder for name in ("whole", "parts")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_and_packed_runs_train_the_same_weights_and_log_the_same_flops(tmp_path, family, unsampled):
    optimizer = OptimizerConfig(lr=3e-3, eps=1e-5, unsampled=unsampled)
    config = train_config(FAMILIES[family], SamplingConfig(rescale_layers=True), optimizer)
    packed, expected = run(config, tmp_path / "packed")
    masked, found = run(replace(config, kernels="masked"), tmp_path / "masked")
    for a, b in zip(found.records, expected.records, strict=True):
        assert {k: v for k, v in a.items() if "flops" in k} == {k: v for k, v in b.items() if "flops" in k}
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)
    weights = snapshot(packed.model)
    for name, tensor in snapshot(masked.model).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logged_flops_are_what_the_loops_step_executes(monkeypatch, family, grad_accum):
    """Under the contract's conditions: eager, the MATH attention, without evaluation."""
    training, recorder = start(train_config(FAMILIES[family], grad_accum=grad_accum))
    monkeypatch.setattr(training, "validate", lambda subnet: 0.0)
    for step in range(15):
        stage = stage_at(training.stages, step)
        subnet = training._build(stage)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            training._train_step(stage, subnet)
        assert counter.get_total_flops() == recorder.records[-1]["flops/step"], f"step {step}"
    assert sum(record["flops/step"] for record in recorder.records) == recorder.records[-1]["flops/total"]


def test_checkpoints_come_at_their_steps_and_at_the_end(tmp_path):
    config = train_config(GPT2, checkpoint_every=6, save_final="weights")
    _, recorder = run(config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000012", "step-00000015"]
    assert [message.split("step-")[1] for message in recorder.messages] == ["00000006", "00000012", "00000015"]
    assert not Checkpoints(tmp_path).newest(pytest.fail).can_resume


def test_checkpoints_at_boundaries_come_at_the_end_of_every_stage_but_the_last_and_stay(tmp_path):
    config = train_config(GPT2, checkpoint_every=6, save_final="weights")
    config = replace(config, checkpoint=CheckpointConfig(keep=1, at_boundaries=True))
    training, _ = start(config)
    training.run(Checkpoints(tmp_path, keep=1, lasting=config.lasting_checkpoints), stopping=lambda: False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000007", "step-00000015"]


@pytest.mark.parametrize("kernels", ["torch", "masked"])
def test_bf16_trains_fp32_weights(tmp_path, kernels):
    config = train_config(LLAMA, optimizer=OptimizerConfig(lr=1e-2), max_steps=30, batch_size=8)
    training, recorder = run(
        replace(config, kernels=kernels, trainer=replace(config.trainer, precision="bf16")), tmp_path
    )
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
    assert recorder.records[-1]["val/loss"] == pytest.approx(training.val_loss)
    fp32 = run(config, tmp_path / "fp32")[1].records
    assert fp32[-1]["train/loss"] < fp32[0]["train/loss"] - 0.1, "far enough from the start to tell runs apart"
    for a, b in zip(recorder.records, fp32, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=0.03)


def test_a_disk_that_fills_up_costs_no_step_and_is_told_once(tmp_path, monkeypatch):
    """Checkpoints 4 to 12 find no room; the run goes on, and the last one is written again."""
    config = train_config(LLAMA, checkpoint_every=2, save_final="full")
    training, recorder = start(config)
    complete = Checkpoints._complete

    def sometimes_full(self, temporary, step, *rest):
        if 3 < step < 13:
            raise OSError(28, "No space left on device")
        return complete(self, temporary, step, *rest)

    monkeypatch.setattr(Checkpoints, "_complete", sometimes_full)
    assert training.run(Checkpoints(tmp_path), stopping=lambda: False).status == "done"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000014", "step-00000015"]
    told = [message for message in recorder.messages if "No space left" in message]
    assert told == [
        "the checkpoint of step 4 could not be written (No space left on device); step 2's stays; training goes on"
    ]
    assert repeatable(recorder.records) == repeatable(run(config, tmp_path / "whole")[1].records)


@pytest.mark.parametrize("ends", ["at its end", "when it is asked to stop"])
def test_a_run_whose_last_checkpoint_finds_no_room_is_not_done(tmp_path, monkeypatch, ends):
    training, _ = start(train_config(LLAMA, checkpoint_every=6, save_final="full"))
    complete = Checkpoints._complete

    def full_later(self, temporary, step, *rest):
        if step > 6:
            raise OSError(28, "No space left on device")
        return complete(self, temporary, step, *rest)

    monkeypatch.setattr(Checkpoints, "_complete", full_later)
    with pytest.raises(RunFailed, match=r"No space left on device\); step 6's stays$"):
        training.run(Checkpoints(tmp_path), stopping=lambda: ends != "at its end" and training.step == 8)
    assert Checkpoints(tmp_path).newest(pytest.fail).step == 6


def test_a_run_that_was_killed_after_its_last_checkpoint_is_done_without_writing_it_again(tmp_path, monkeypatch):
    """Between the final checkpoint and the summary; weights alone suffice then."""
    config = train_config(LLAMA, checkpoint_every=6, save_final="weights")
    run(config, tmp_path)
    again, recorder = start(config)
    again.restore(Checkpoints(tmp_path).to_resume(15, pytest.fail))
    monkeypatch.setattr(Checkpoints, "save", lambda *_: pytest.fail("nothing is new"))
    outcome = again.run(Checkpoints(tmp_path), stopping=lambda: False)
    assert (outcome.status, outcome.steps, recorder.records) == ("done", 15, [])
    assert again.val_loss is not None
