"""Downstream tasks through EleutherAI's lm-eval, an optional library: importing this module needs it."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets.exceptions import DatasetNotFoundError
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from est_cli.data.tokenizers import Tokenizer
from est_cli.errors import UserError, nearest
from est_cli.evaluation.generation import Decoding, generate_text
from est_cli.evaluation.run import OpenRun
from est_cli.model.transformer import Transformer

_MAX_GENERATED = 256
"""lm-eval's own default if a task does not set it."""
_BOOTSTRAPS = 1000
"""For standard errors of metrics without a formula."""


def evaluate_tasks(
    run: OpenRun,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of the full model on each task, `metric` and `metric_stderr`. Raises UserError.

    `tasks_dir` holds the user's own task files; `limit` is the number of examples to take from each task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Bootstraps of this size need no processes, and forking is not safe with torch's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    manager = _manager(tasks, tasks_dir)
    problems = [
        f"tasks={task}: lm-eval has no such task{nearest(task, manager.all_tasks)}"
        for task in tasks
        if not manager.match_tasks([task])
    ]
    if problems:
        raise UserError(*problems)
    adapter = Adapter(run.model, tokenizer, run.config.trainer.batch_size)
    try:
        results = simple_evaluate(
            adapter,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
        )["results"]
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"tasks=[{','.join(tasks)}]: the data of a task cannot be read ({error}); without a network, write task "
            "files that name local data, and give tasks_dir=FOLDER"
        ) from None
    return {task: _numbers(metrics) for task, metrics in results.items()}


def _manager(tasks: Sequence[str], tasks_dir: Path | None) -> TaskManager:
    """The index of the user's tasks; only if a task is not among them also lm-eval's, which has thousands of files."""
    if tasks_dir is None:
        return TaskManager()
    own = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    return own if set(tasks) <= set(own.all_tasks) else TaskManager(include_path=str(tasks_dir))


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Renames `acc,none` to acc; filters other than none stay in the name."""
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float) and "," in key}
    return {key.removesuffix(",none"): value for key, value in numbers.items()}


class Adapter(TemplateLM):
    """A model of ours behind lm-eval's interface."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int):
        super().__init__()
        self.model, self.text = model, tokenizer
        self.batch = batch_size
        self.max_length = model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.text.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.text.encode(string)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"tasks: an answer of {longest} tokens does not fit the model, model.max_seq_len={self.max_length}"
            )
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows as long as the model allows."""
        windows = [list(self._windows(self.tok_encode(request.args[0]))) for request in requests]
        scores = iter(self._score([window for own in windows for window in own]))
        return [sum(next(scores)[0] for _ in own) for own in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return map(make_disjoint_window, rolling)

    @torch.no_grad()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        # Texts of similar length need little padding; the model never attends to padding on the right.
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            texts = [(pairs[i][0] + pairs[i][1])[-(self.max_length + 1) :] for i in chosen]
            inputs = pad_sequence([torch.tensor(text[:-1]) for text in texts], batch_first=True)
            hidden = self.model.hidden(inputs.to(device))
            for i, states, text in zip(chosen, hidden, texts, strict=True):
                answer = torch.tensor(pairs[i][1], device=device)
                states = states[len(text) - 1 - len(answer) : len(text) - 1]
                logits = F.linear(states, self.model.head_weight).float()
                chosen_log = logits.log_softmax(-1).gather(1, answer[:, None]).double().sum().item()
                scores[i] = (chosen_log, bool((logits.argmax(-1) == answer).all()))
        return scores

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = list(filter(None, [until] if isinstance(until, str) else until))
        budget = settings.get("max_gen_toks", _MAX_GENERATED)
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        decoding = Decoding(max_tokens=budget, temperature=temperature, top_k=settings.get("top_k"))
        text = ""
        for piece, _ in generate_text(self.model, self.text, context, decoding):
            text += piece
            if any(stop in text for stop in until):
                break
        for stop in until:
            text = text.split(stop)[0]
        return text
