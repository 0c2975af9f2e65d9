"""Downstream tasks through EleutherAI's lm-eval, an optional library: importing this module needs it.

lm-eval measures an export of the model with its own class for Hugging Face models.
"""

import logging
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from datasets.exceptions import DatasetNotFoundError
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from est_cli.data.tokenizers import Tokenizer
from est_cli.errors import UserError, nearest
from est_cli.evaluation.export import export
from est_cli.evaluation.run import OpenRun

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
    """Metrics of the full model in fp32 on each task, `metric` and `metric_stderr`.

    `tasks_dir` holds the user's own task files; `limit` is the number of examples to take from each task. Raises
    UserError if no Hugging Face class can hold the model, or lm-eval cannot run a task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
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
    try:
        results = simple_evaluate(
            _exported(run, tokenizer),
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
    except AssertionError as error:  # so HFLM refuses an example that is too long
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(
            f"tasks=[{','.join(tasks)}]: lm-eval cannot run them with model.max_seq_len="
            f"{run.model.config.max_seq_len}: {reason}"
        ) from error
    return {task: _numbers(metrics) for task, metrics in results.items()}


def _manager(tasks: Sequence[str], tasks_dir: Path | None) -> TaskManager:
    """The index of the user's tasks; only if a task is not among them also lm-eval's, which has thousands of files."""
    if tasks_dir is None:
        return TaskManager()
    own = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    return own if set(tasks) <= set(own.all_tasks) else TaskManager(include_path=str(tasks_dir))


def _exported(run: OpenRun, tokenizer: Tokenizer) -> HFLM:
    device = str(next(run.model.parameters()).device)
    with TemporaryDirectory() as folder:
        export(run.model, run.model, tokenizer, Path(folder))
        return HFLM(folder, device=device, dtype="float32", batch_size=run.config.trainer.batch_size)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Renames `acc,none` to acc; filters other than none stay in the name."""
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float) and "," in key}
    return {key.removesuffix(",none"): value for key, value in numbers.items()}
