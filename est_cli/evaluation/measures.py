"""How much est-analyze measures; the keys of its config."""

from dataclasses import dataclass
from typing import Annotated, Literal

from est_cli.config import Count, Positive
from est_cli.schema import Within


@dataclass(frozen=True)
class Measures:
    """All losses are in nats and in fp32, on validation text."""

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
