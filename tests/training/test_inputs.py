"""What is made ahead comes in order, and fails where it is asked for. test_steps.py: it changes no bit."""

import threading

import pytest
from tiny import LLAMA, RandomTokens, train_config

from est_cli.data.batches import training_windows
from est_cli.errors import UserError
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.inputs import Inputs
from tests.training.runs import CPU, start, train


def inputs(make, end: int) -> Inputs:
    found = Inputs(train_config(LLAMA), RandomTokens(LLAMA.vocab_size), CPU)
    found._make, found.end = make, end
    return found


def test_the_next_step_is_made_in_a_thread_unless_it_is_beyond_the_end_or_another_is_asked_for():
    made = []
    ahead = inputs(lambda step: made.append((step, threading.current_thread())) or step * step, end=4)
    assert [ahead.of(step) for step in (0, 1, 2, 3, 9, 0, 2)] == [0, 1, 4, 9, 81, 0, 4]
    in_main = [step for step, thread in made if thread is threading.main_thread()]
    assert (in_main, [step for step, _ in made][:4]) == ([0, 9, 0, 2], [0, 1, 2, 3])


def test_an_error_is_raised_for_its_own_step():
    def make(step: int) -> int:
        if step == 1:
            raise OSError("the stream cannot be read")
        return step

    ahead = inputs(make, end=3)
    assert ahead.of(0) == 0
    with pytest.raises(OSError, match="stream"):
        ahead.of(1)


class Stream:
    """Hands on windows up to the broken line."""

    def __init__(self, tokens, end):
        self.tokens, self.end = tokens, end

    def windows(self, seq_len, seed, first, count):
        if first + count > self.end:
            raise UserError("a.jsonl, line 9: is no JSON")
        return training_windows(self.tokens, seq_len, seed, first, count)


@pytest.mark.parametrize("ahead", [0, 15], ids=["made in time", "made ahead"])
def test_a_stream_that_breaks_leaves_a_checkpoint_of_the_last_step(tmp_path, ahead):
    tokens, config = RandomTokens(LLAMA.vocab_size), train_config(LLAMA)
    tokens.train = Stream(tokens.train, 7 * config.sequences_per_step)
    training, _ = start(config, tokens=tokens)
    training.inputs.end = ahead
    with pytest.raises(UserError, match="line 9"):
        train(training, tmp_path)
    assert Checkpoints(tmp_path).to_resume(config.trainer.max_steps, lambda _: None).step == 7
