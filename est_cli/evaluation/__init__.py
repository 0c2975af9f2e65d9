"""What a trained run is worth, always of the full model unless subnetworks are asked for.

run         a run directory opened for reading: config, data, model, and its subnetworks as models
loss        loss, perplexity and bits per byte; the losses of sampled subnetworks
sharpness   the Hessian's largest eigenvalue, and the rise of the loss under noise
analysis    est-analyze: stage transitions, spread and sharpness of a run
generation  text, a token at a time
tasks       downstream tasks through lm-eval
export      a folder that `transformers` loads
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from est_cli.config import Count, Positive
from est_cli.lazy import on_demand
from est_cli.schema import Within

__getattr__ = on_demand(__name__)


@dataclass(frozen=True)
class Measures:
    """How much est-analyze measures. All losses are in nats, in fp32, on validation text."""

    tokens: Count
    """Of the validation split, for every loss."""
    plans: Count
    """Subnetworks to sample for each of the rates."""
    window: Count
    """Logged steps on either side of a transition."""
    checkpoints: Literal["all", "newest"]
    hessian_tokens: Count
    iterations: Count
    """Of the power iteration, at most."""
    norms: tuple[Positive, ...]
    """Of the random noise, as shares of the weights' norm."""
    draws: Count
    """Of the noise, for each norm."""
    seed: Annotated[int, Within(0, 2**32 - 1)]
