"""A stream that cannot be read any further ends a run between two steps, with a checkpoint from which it goes on."""

import pytest
import torch
from tiny import LLAMA, RandomTokens, Recorder, train_config

from est_cli.data.batches import training_windows
from est_cli.errors import UserError
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import World
from est_cli.training.loop import Training

BROKEN_STEP = 7


class Stream:
    """Hands on windows up to the broken line."""

    def __init__(self, tokens, end):
        self.tokens, self.end = tokens, end

    def windows(self, seq_len, seed, first, count):
        if first + count > self.end:
            raise UserError("a.jsonl, line 9: is no JSON")
        return training_windows(self.tokens, seq_len, seed, first, count)


def test_a_stream_that_breaks_leaves_a_checkpoint_of_the_last_step(tmp_path):
    tokens, config = RandomTokens(LLAMA.vocab_size), train_config(LLAMA)
    tokens.train = Stream(tokens.train, BROKEN_STEP * config.sequences_per_step)
    training = Training(config, tokens, World(torch.device("cpu")), [Recorder()])
    with pytest.raises(UserError, match="line 9"):
        training.run(Checkpoints(tmp_path), stopping=lambda: False)
    assert Checkpoints(tmp_path).to_resume(config.trainer.max_steps, lambda _: None).step == BROKEN_STEP
