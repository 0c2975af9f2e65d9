"""Loss, perplexity and bits per byte of the full model on a validation split."""

import math
from dataclasses import dataclass

import numpy as np

from est_cli.data.batches import validation_windows
from est_cli.errors import UserError
from est_cli.evaluation.run import OpenRun
from est_cli.subnet.plan import Subnetwork
from est_cli.training.distributed import World
from est_cli.training.subnetwork import DTYPES, PackedSubnetwork
from est_cli.training.validation import validation_loss


@dataclass(frozen=True)
class Loss:
    val_loss: float
    """Nats a token."""
    tokens: int
    bytes: int
    """UTF-8 bytes that the predicted tokens stand for."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.val_loss)

    @property
    def bits_per_byte(self) -> float:
        return self.val_loss * self.tokens / self.bytes / math.log(2)


def evaluate(
    run: OpenRun, tokens: np.ndarray, token_bytes: np.ndarray, n_tokens: int, seq_len: int | None = None
) -> Loss:
    """As the run itself evaluates: its batch size and precision, and its sequence length where none is given.

    tokens [n] of the validation split; token_bytes [V]; n_tokens is how many of them to predict. Raises UserError
    where there are too few.
    """
    config = run.config
    seq_len = seq_len or config.data.seq_len
    if seq_len > config.model.max_seq_len:
        raise UserError(
            f"data.seq_len={seq_len}: must be at most the model's, model.max_seq_len={config.model.max_seq_len}"
        )
    if len(tokens) <= seq_len:
        raise UserError(
            f"data.seq_len={seq_len}: the validation split has {len(tokens)} tokens, and needs {seq_len + 1}; use more "
            "text, a larger data.val_fraction, or a smaller data.seq_len"
        )
    windows = validation_windows(tokens, seq_len, n_tokens)
    world = World(next(run.model.parameters()).device)
    whole = PackedSubnetwork(run.model, Subnetwork(run.model.config), DTYPES[config.trainer.precision])
    loss = validation_loss(whole, windows, config.trainer.batch_size, world)
    targets = windows[:, 1:]
    return Loss(loss, targets.size, round(token_bytes[targets].sum()))
