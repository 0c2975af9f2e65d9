"""What is made ahead changes no bit, comes in order, and fails where it is asked for."""

import threading

import pytest
import torch
from tiny import LLAMA, RandomTokens, Recorder, train_config

from est_cli.training.ahead import Ahead
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import World
from est_cli.training.loop import Training


def start() -> tuple[Training, Recorder]:
    recorder = Recorder()
    config = train_config(LLAMA, grad_accum=2, save_final="full", eval_every=4)
    return Training(config, RandomTokens(LLAMA.vocab_size), World(torch.device("cpu")), [recorder]), recorder


def test_plans_and_batches_made_ahead_train_the_same_weights_also_after_a_stop(tmp_path):
    (usual, expected), (first, before), (second, after) = start(), start(), start()
    usual.run(Checkpoints(tmp_path / "usual"), stopping=lambda: False)
    first.inputs.ahead.end = second.inputs.ahead.end = 15
    first.run(Checkpoints(tmp_path / "ahead"), stopping=lambda: first.step == 6)
    second.restore(Checkpoints(tmp_path / "ahead").newest(pytest.fail))
    second.run(Checkpoints(tmp_path / "ahead"), stopping=lambda: False)
    losses = [[record["train/loss"] for record in r.records] for r in (expected, before, after)]
    assert losses[1] + losses[2] == losses[0]
    assert all(torch.equal(a, b) for a, b in zip(usual.model.parameters(), second.model.parameters(), strict=True))


def test_the_next_one_is_made_in_a_thread_and_none_beyond_the_end():
    made = []
    ahead = Ahead(lambda step: made.append((step, threading.current_thread())) or step * step, end=4)
    assert [ahead.of(step) for step in range(4)] == [0, 1, 4, 9]
    assert ahead.finish() is None
    assert [step for step, _ in made] == [0, 1, 2, 3]
    assert [thread is threading.main_thread() for _, thread in made] == [True, False, False, False]


def test_a_step_that_was_not_expected_is_made_when_it_is_asked_for():
    ahead = Ahead(lambda step: -step, end=10)
    assert [ahead.of(step) for step in (5, 2, 3, 3)] == [-5, -2, -3, -3]


def test_an_error_is_raised_for_its_own_step():
    def make(step: int) -> int:
        if step == 1:
            raise OSError("the stream cannot be read")
        return step

    ahead = Ahead(make, end=3)
    assert ahead.of(0) == 0
    with pytest.raises(OSError, match="stream"):
        ahead.of(1)
