"""A loss or gradient that is not finite: no weight moves, the step can be run again, and what follows is as asked."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import GPT2, LLAMA, snapshot, train_config

from est_cli.config import OptimizerConfig
from est_cli.data.batches import training_windows
from est_cli.errors import RunFailed
from est_cli.subnet.schedule import StageSpec, stage_at
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.loop import Training
from est_cli.training.nonfinite import keep_step, read, replay
from est_cli.training.steps import Launched, NonFinite
from tests.training import runs
from tests.training.runs import CPU, assert_same_bits, train

BAD_STEP = 5
"""In stage 2 of `train_config`."""


def start(kind=Training, model=LLAMA, **trainer):
    return runs.start(train_config(model, grad_accum=2, **trainer), kind)


class BrokenGradient(Training):
    """The loss is finite, and one gradient is not: what an overflow in the backward pass looks like."""

    bad_steps = (BAD_STEP,)

    def _build(self, stage):
        subnet = super()._build(stage)
        updates = subnet.updates

        def broken_updates():
            found = updates()
            if self.step in self.bad_steps:
                found[-1].gradient.view(-1)[0] = math.inf
            return found

        subnet.updates = broken_updates
        return subnet


@pytest.mark.parametrize("unsampled", ["zero_grad", "freeze"])
@pytest.mark.parametrize(("log_every", "behind"), [(1, 0), (1, 1), (100, 0), (100, 1)])
def test_the_run_stops_with_everything_as_it_was_before_the_step(tmp_path, log_every, behind, unsampled):
    """Also if the host hears of it late: the device refuses the step, and all that were launched after it."""
    settings = {"optimizer": OptimizerConfig(unsampled=unsampled), "log_every": log_every}
    sound, _ = start(**settings)
    train(sound, tmp_path / "sound", stop_after=BAD_STEP)
    broken, recorder = start(BrokenGradient, **settings)
    broken.steps.behind = behind
    with pytest.raises(NonFinite, match=r"step 5 \(stage 2\) is not finite") as caught:
        train(broken, tmp_path / "broken")
    step = caught.value.step
    assert (step.number, step.stage.number, broken.step) == (BAD_STEP, 2, BAD_STEP)
    assert math.isfinite(step.loss) and not math.isfinite(step.grad_norm)
    assert step.plan.as_dict() == broken.inputs.of(BAD_STEP)[0].as_dict()
    assert_same_bits(broken, sound)
    assert [record["step"] for record in recorder.records] == ([0] if log_every == 100 else list(range(BAD_STEP)))


@pytest.mark.parametrize("what", ["checkpoint", "growth"])
def test_a_checkpoint_or_a_growth_first_reads_the_steps_before_it(tmp_path, what):
    settings = {"log_every": 100, "checkpoint_every": 7 if what == "checkpoint" else 0, "save_final": "full"}
    if what == "growth":
        settings["stages"] = (StageSpec(7, n_layers=2), StageSpec())
    broken, recorder = start(BrokenGradient, **settings)
    with pytest.raises(NonFinite, match=f"step {BAD_STEP}"):
        train(broken, tmp_path)
    assert Checkpoints(tmp_path).newest(pytest.fail) is None
    assert not any("the model" in message for message in recorder.messages), "it has not grown"


@pytest.mark.parametrize("stop_after", [None, 8], ids=["in one go", "restarted between the two"])
def test_skip_leaves_steps_out_counts_them_and_says_so_once(tmp_path, stop_after):
    broken, recorder = start(BrokenGradient, on_nonfinite="skip")
    broken.bad_steps = (BAD_STEP, 9)
    outcome = train(broken, tmp_path, stop_after)
    records, messages = recorder.records, recorder.messages
    if stop_after:
        broken, recorder = runs.resumed(broken.config, tmp_path, BrokenGradient)
        broken.bad_steps = (BAD_STEP, 9)
        outcome = train(broken, tmp_path)
        records, messages = records + recorder.records, messages + recorder.messages
    assert (outcome.status, outcome.steps, outcome.skipped_steps) == ("done", 15, 2)
    assert [record["step"] for record in records] == list(range(15))
    assert [record["step"] for record in records if not math.isfinite(record["train/grad_norm"])] == [BAD_STEP, 9]
    assert all(math.isfinite(record["train/loss"]) for record in records)
    said = [message for message in messages if "not finite" in message]
    assert len(said) == 1 and "step 5" in said[0] and "trainer.on_nonfinite=skip" in said[0]
    assert set(broken.optimizer.counts["embedding"]) == {13}


@pytest.mark.parametrize(("on_nonfinite", "ends"), [("stop", True), ("skip", False)])
def test_a_validation_loss_that_is_not_finite_is_no_result(tmp_path, monkeypatch, on_nonfinite, ends):
    training, _ = start(eval_every=4, on_nonfinite=on_nonfinite, save_final="full")
    monkeypatch.setattr(training, "validate", lambda subnet: math.nan)
    if ends:
        with pytest.raises(RunFailed, match="the validation loss after step 3 is nan"):
            train(training, tmp_path)
        assert Checkpoints(tmp_path).newest(pytest.fail) is None
    else:
        assert train(training, tmp_path).status == "done"


def keep_failed_step(folder, training: Training, failed: NonFinite):
    windows = training.inputs.of_all_ranks(training.step)
    return keep_step(folder, failed, training.weights(), windows, training.config)


def kept_step(tmp_path, training: Training):
    with pytest.raises(NonFinite) as caught:
        train(training, tmp_path / "checkpoints")
    return keep_failed_step(tmp_path / "nonfinite", training, caught.value)


def test_step_plan_and_batch_are_kept_in_files_that_run_no_code(tmp_path):
    training, _ = start(BrokenGradient)
    folder = kept_step(tmp_path, training)
    assert sorted(path.name for path in folder.iterdir()) == ["batch.safetensors", "model.safetensors", "step.json"]
    content = json.loads((folder / "step.json").read_text())
    assert (content["step"], content["stage"], content["grad_norm"]) == (BAD_STEP, 2, None)
    assert math.isfinite(content["loss"])
    kept, n = read(folder), training.config.sequences_per_step
    expected = training_windows(training.inputs.tokens, 8, training.config.seed, BAD_STEP * n, n)
    np.testing.assert_array_equal(kept.windows.numpy(), expected)
    assert kept.plan.as_dict() == content["plan"]
    torch.testing.assert_close(kept.weights, snapshot(training.model), rtol=0, atol=0)


@pytest.mark.parametrize("kernels", ["torch", "masked"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replay_computes_the_steps_own_losses(tmp_path, kernels, precision):
    """The replayed mean loss and gradient norm are those of the run's own step, here one that is finite."""
    training, recorder = start(model=GPT2, kernels=kernels, precision=precision)
    train(training, tmp_path, stop_after=BAD_STEP)
    step = Launched(BAD_STEP, stage_at(training.stages, BAD_STEP), training.inputs.of(BAD_STEP)[0], 0.0)
    folder = keep_failed_step(tmp_path, training, NonFinite(step))
    train(training, tmp_path, stop_after=BAD_STEP + 1)
    seen, record = replay(read(folder), training.config, CPU.device), recorder.records[BAD_STEP]
    assert (len(seen.losses), seen.first, seen.weights, seen.gradients) == (2, None, [], [])
    assert np.mean(seen.losses) == pytest.approx(record["train/loss"], rel=1e-6)
    assert seen.grad_norm == pytest.approx(record["train/grad_norm"], rel=1e-6)


def test_a_replay_names_where_it_begins_in_the_full_models_numbering(tmp_path):
    """A NaN in a layer that the packed model calls by another number."""
    training = next(run for run, _ in (start(seed=seed) for seed in range(9)) if 0 not in run.inputs.of(0)[0].layers)
    layer = training.inputs.of(0)[0].layers[0]
    broken = f"blocks.{layer}.mlp.down"
    dict(training.model.named_parameters())[f"{broken}.weight"].data.fill_(math.nan)
    seen = replay(read(kept_step(tmp_path, training)), training.config, CPU.device)
    assert (seen.first, seen.weights) == (broken, [f"{broken}.weight"])
    assert seen.losses == [None, None] and seen.grad_norm is None
    assert "embedding" in seen.gradients
