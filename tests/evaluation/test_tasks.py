"""lm-eval on a run: end to end on the task files beside this one, and scores that are the model's own."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'est-cli[tasks]'")

from lm_eval.api.instance import Instance

from est_cli.data.tokenizers import ByteTokenizer
from est_cli.errors import UserError
from est_cli.evaluation.run import open_run
from est_cli.evaluation.tasks import Adapter, evaluate_tasks
from evaluation.tiny_runs import byte_model, model_of, write_run

TASKS = Path(__file__).parent / "tasks"
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    return model_of(byte_model("llama"))


@pytest.fixture(scope="module")
def adapter(model):
    return Adapter(model, TOKENIZER, batch_size=3)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def log_probability(model, context: str, answer: str) -> float:
    """One text at a time, one token at a time."""
    ids = TOKENIZER.encode(context + answer) if context else [TOKENIZER.eot, *TOKENIZER.encode(answer)]
    log = torch.log_softmax(model.logits(torch.tensor([ids]))[0].double(), -1)
    n_answer = len(answer.encode())
    return sum(log[i - 1, ids[i]].item() for i in range(len(ids) - n_answer, len(ids)))


@torch.no_grad()
def test_an_answers_score_is_the_sum_of_its_tokens_log_probabilities(model, adapter):
    pairs = [("abc", "de"), ("a", "xyz"), ("", "hello"), ("a longer one", "?"), ("tab", "\t\n")]
    found = adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([log_probability(model, *p) for p in pairs], abs=1e-4)


@torch.no_grad()
def test_only_the_likeliest_answer_is_greedy(model, adapter):
    best = model.logits(torch.tensor([TOKENIZER.encode("abc")]))[0, -1, :128].argmax().item()
    pairs = [("abc", chr(best)), ("abc", chr((best + 1) % 128))]
    all_logits = model.logits(torch.tensor([TOKENIZER.encode("abc")]))[0, -1]
    found = adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [all_logits.argmax().item() == best, False]


@torch.no_grad()
def test_a_long_text_is_scored_once_in_windows_that_fit(model, adapter):
    text = "a text that is longer than the window of the model"
    (found,) = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    ids, longest = [TOKENIZER.eot, *TOKENIZER.encode(text)], model.config.max_seq_len
    expected, start = 0.0, 0
    while start + 1 < len(ids):
        end = min(start + longest, len(ids) - 1)
        first = start if start == 0 else end - longest
        log = torch.log_softmax(model.logits(torch.tensor([ids[first:end]]))[0].double(), -1)
        expected += sum(log[i - 1 - first, ids[i]].item() for i in range(start + 1, end + 1))
        start = end
    assert found == pytest.approx(expected, abs=1e-3)


def test_an_answer_that_does_not_fit_is_refused(adapter):
    with pytest.raises(UserError, match=r"an answer of 17 tokens does not fit the model, model.max_seq_len=16"):
        adapter.loglikelihood(requests("loglikelihood", ("a", "b" * 17)), disable_tqdm=True)


def test_generation_stops_before_what_the_task_names(adapter):
    free, other = adapter.generate_until(
        requests("generate_until", ("abc", {"max_gen_toks": 6}), ("abc", {"max_gen_toks": 6, "until": []}))
    )
    assert free == other
    stop = free[2]
    (stopped,) = adapter.generate_until(requests("generate_until", ("abc", {"max_gen_toks": 6, "until": [stop]})))
    assert stopped == free.split(stop)[0]


def test_task_files_of_ones_own_run_end_to_end(tmp_path, model):
    run = open_run(write_run(tmp_path / "run", model), print)
    found = evaluate_tasks(run, TOKENIZER, ["tiny_choice", "tiny_text", "tiny_generation"], TASKS)
    pairs = [[log_probability(model, f"{letter} is", answer) for answer in (" so", " not")] for letter in "abcdef"]
    right = sum((scores[0] > scores[1]) == (n % 2 == 0) for n, scores in enumerate(pairs))
    assert found["tiny_choice"]["acc"] == pytest.approx(right / 6)
    assert found["tiny_text"]["bits_per_byte"] > 0
    assert found["tiny_generation"]["exact_match"] == 0
    assert "acc_stderr" in found["tiny_choice"]


def test_an_unknown_task_is_named_with_the_nearest(tmp_path, model):
    run = open_run(write_run(tmp_path / "run", model), print)
    with pytest.raises(UserError, match="tasks=tiny_choise: lm-eval has no such task; did you mean 'tiny_choice'"):
        evaluate_tasks(run, TOKENIZER, ["tiny_choise"], TASKS)
