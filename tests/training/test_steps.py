"""The host waits for the device once in a step that is logged, and never in another; working ahead changes nothing."""

from collections import Counter

import pytest
import torch
from tiny import LLAMA, train_config

from est_cli.config import OptimizerConfig
from tests.training.runs import assert_same_bits, finished, resumed, start, told, train

WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor with which a host waits for what a device computes."""


@pytest.fixture
def waits(monkeypatch) -> list[str]:
    called = []

    def watched(name: str):
        method = getattr(torch.Tensor, name)
        return lambda *arguments: called.append(name) or method(*arguments)

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    return called


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize(("log_every", "on_nonfinite"), [(1, "stop"), (4, "stop"), (100, "stop"), (4, "skip")])
def test_the_host_waits_once_in_a_step_that_is_logged_and_never_in_another(
    tmp_path, waits, log_every, on_nonfinite, unsampled, precision
):
    """trainer.on_nonfinite=skip waits in every step: the next one needs to know which step it is."""
    options = {"log_every": log_every, "on_nonfinite": on_nonfinite, "precision": precision}
    training, _ = start(train_config(LLAMA, optimizer=OptimizerConfig(unsampled=unsampled), **options))
    per_step, step = Counter(), training._train_step

    def counted(*arguments):
        before = len(waits)
        step(*arguments)
        per_step[training.step] += len(waits) - before

    training._train_step = counted
    train(training, tmp_path, stop_after=14)
    expected = {n: int(n == 1 or n % log_every == 0 or on_nonfinite == "skip") for n in range(1, 15)}
    assert dict(per_step) == expected, waits


@pytest.mark.parametrize(("behind", "ahead"), [(1, 0), (0, 15), (1, 15)], ids=["read late", "made ahead", "both"])
def test_a_gpus_order_of_work_changes_no_record_and_no_bit_also_after_a_stop(tmp_path, behind, ahead):
    """Steps are read after the next one was launched; plans and batches are made ahead."""
    config = train_config(LLAMA, grad_accum=2, log_every=2, eval_every=5, checkpoint_every=4, save_final="full")
    usual, expected = finished(config, tmp_path / "usual")
    first, before = start(config)
    first.steps.behind, first.inputs.end = behind, ahead
    train(first, tmp_path / "gpu", stop_after=6)
    second, after = resumed(config, tmp_path / "gpu")
    second.steps.behind, second.inputs.end = behind, ahead
    train(second, tmp_path / "gpu")
    assert told(before, after) == told(expected)
    assert all(record["perf/step_s"] > 0 for record in before.records + after.records)
    assert_same_bits(second, usual)


def test_the_device_has_the_next_step_when_the_host_reads_a_loss(tmp_path):
    training, recorder = start(train_config(LLAMA, log_every=1))
    training.steps.behind = 1
    seen = []
    recorder.log = lambda record: seen.append((record["step"], training.step))
    train(training, tmp_path, stop_after=6)
    assert seen[:5] == [(step, step + 2) for step in range(5)]


def test_the_seconds_of_a_step_are_those_since_the_restart(tmp_path):
    config = train_config(LLAMA)
    first, _ = start(config)
    first.progress.train_s = 1000.0
    train(first, tmp_path, stop_after=6)
    second, recorder = resumed(config, tmp_path)
    train(second, tmp_path)
    assert second.progress.train_s > 1000
    assert all(record["perf/step_s"] < 100 for record in recorder.records)
