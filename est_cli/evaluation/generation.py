"""Samples text from a model, a token at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from est_cli.data.tokenizers import Tokenizer
from est_cli.model.transformer import Transformer

_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen."""

    max_tokens: int = 200
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int | None = 50
    """Number of most likely tokens to choose from; null keeps all."""
    seed: int = 0


@torch.no_grad()
def generate_tokens(
    model: Transformer, prompt: Sequence[int], vocab_size: int, eot: int, decoding: Decoding
) -> Iterator[int]:
    """Token ids after `prompt`, up to the end-of-text token (excluded).

    Never yields ids of `vocab_size` and above, which the tokenizer does not have. The model sees the last max_seq_len
    tokens; an empty prompt starts a document.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(decoding.seed)
    ids = list(prompt) or [eot]
    for _ in range(decoding.max_tokens):
        window = torch.tensor([ids[-model.config.max_seq_len :]], device=device)
        logits = F.linear(model.hidden(window)[0, -1], model.head_weight)[:vocab_size]
        token = _choose(logits.double().cpu(), decoding, generator)
        if token == eot:
            return
        ids.append(token)
        yield token


def generate_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, decoding: Decoding
) -> Iterator[tuple[str, int]]:
    """Pieces of text that continue `prompt`, each as soon as it is complete, with its number of tokens."""
    ids = tokenizer.encode(prompt)
    said, pending = tokenizer.decode(ids), 0
    for token in generate_tokens(model, ids, tokenizer.vocab_size, tokenizer.eot, decoding):
        ids.append(token)
        pending += 1
        text = tokenizer.decode(ids)
        # One character can consist of several tokens.
        if not text.endswith(_INCOMPLETE):
            yield text[len(said) :], pending
            said, pending = text, 0
    if pending:
        yield tokenizer.decode(ids)[len(said) :], pending


def _choose(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    """One of `logits` [V]."""
    if decoding.temperature == 0:
        return logits.argmax().item()
    values, tokens = logits.topk(min(decoding.top_k or len(logits), len(logits)))
    probabilities = torch.softmax(values / decoding.temperature, dim=0)
    return tokens[torch.multinomial(probabilities, 1, generator=generator)].item()
