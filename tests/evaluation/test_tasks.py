"""lm-eval on a run: end to end on the task files beside this one, with scores that are the model's own."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'est-cli[tasks]'")

from est_cli.data.tokenizers import ByteTokenizer
from est_cli.errors import UserError
from est_cli.evaluation.run import open_run
from est_cli.evaluation.tasks import evaluate_tasks
from evaluation.tiny_runs import byte_model, model_of, write_run

TASKS = Path(__file__).parent / "tasks"
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return open_run(write_run(tmp_path_factory.mktemp("runs") / "run", model_of(byte_model("llama"))), print)


@torch.no_grad()
def log_probability(model, ids: list[int], n_scored: int) -> float:
    """Of the last tokens, each given all before it."""
    log = torch.log_softmax(model.logits(torch.tensor([ids[:-1]]))[0].double(), -1)
    return log.gather(1, torch.tensor(ids[1:])[:, None])[-n_scored:].sum().item()


def test_scores_are_the_models_own(run):
    found = evaluate_tasks(run, TOKENIZER, ["tiny_choice", "tiny_text", "tiny_generation"], TASKS)
    right = 0
    for n, letter in enumerate("abcdef"):
        so, other = (
            log_probability(run.model, TOKENIZER.encode(f"{letter} is{answer}"), len(answer))
            for answer in (" so", " not")
        )
        right += (so > other) == (n % 2 == 0)
    assert found["tiny_choice"]["acc"] == pytest.approx(right / 6)
    assert "acc_stderr" in found["tiny_choice"]
    assert found["tiny_generation"]["exact_match"] == 0
    texts = ["some words, " * 10, "short"]
    assert found["tiny_text"]["bits_per_byte"] == pytest.approx(bits_per_byte(run.model, texts))


def bits_per_byte(model, texts: list[str]) -> float:
    """Each text follows an end-of-text token, in windows that are as long as the model allows."""
    total, longest = 0.0, model.config.max_seq_len
    for text in texts:
        ids = [TOKENIZER.eot, *TOKENIZER.encode(text)]
        for start in range(0, len(ids) - 1, longest):
            end = min(start + longest, len(ids) - 1)
            total += log_probability(model, ids[max(0, end - longest) : end + 1], end - start)
    return -total / sum(len(text.encode()) for text in texts) / math.log(2)


@pytest.mark.parametrize(
    ("changes", "task", "message"),
    [
        ({}, "tiny_choise", "tasks=tiny_choise: lm-eval has no such task; did you mean 'tiny_choice'"),
        ({"max_seq_len": 3}, "tiny_generation", r"tasks=\[tiny_generation\]: .*max_seq_len=3: .* generate \(4\)"),
        ({"max_seq_len": 3}, "tiny_choice", r"tasks=\[tiny_choice\]: .*max_seq_len=3: .* <= self.max_length"),
        ({"mlp": "gelu"}, "tiny_choice", "model.mlp=gelu"),
    ],
)
def test_what_cannot_be_measured_is_told(run, changes, task, message):
    other = replace(run, model=model_of(byte_model("llama", **changes)))
    with pytest.raises(UserError, match=message):
        evaluate_tasks(other, TOKENIZER, [task], TASKS)
