"""Runs the commands as people do, in a folder of their own: in a process of their own, or called in this one."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULES = {
    "est-train": "train",
    "est-plan": "plan",
    "est-data": "data",
    "est-eval": "evaluate",
    "est-generate": "generate",
    "est-analyze": "analyze",
    "est-export": "export",
    "est-report": "report",
    "est-bench": "bench",
}

TINY = (
    "model.n_layers=4", "model.n_heads=4", "model.n_kv_heads=2", "model.d_model=16", "model.d_ff=24",
    "model.vocab_size=300", "model.max_seq_len=16", "tokenizer=byte", "logger=none", "optimizer.lr=0.01",
    "trainer.device=cpu", "trainer.batch_size=2", "trainer.eval_tokens=64", "trainer.threads=1", "data.seq_len=16",
)  # fmt: skip
"""A model that trains thirty steps in a second."""


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        return json.loads(self.out)


def run(command: str, *arguments: str, cwd: Path, **environment: str) -> Finished:
    """Call the command's `main` with these arguments, from `cwd`."""
    code = f"import sys; sys.argv[0] = {command!r}; from est_cli.commands.{MODULES[command]} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True,
        env=clean_environment(cwd, **environment),
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


def call(command: str, *arguments: str, cwd: Path, **environment: str) -> Finished:
    """The same in this process, which takes a tenth of the time; for what ends before anything trains."""
    main = importlib.import_module(f"est_cli.commands.{MODULES[command]}").main
    before = sys.argv, list(sys.path), dict(os.environ), {n: signal.getsignal(n) for n in signal.valid_signals()}
    out, err = io.StringIO(), io.StringIO()
    os.environ.clear()
    os.environ.update(clean_environment(cwd, **environment))
    sys.argv = [command, *arguments]
    code = None
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.path[:], kept, handlers = before
        os.environ.clear()
        os.environ.update(kept)
        for number, handler in handlers.items():
            if handler is not None and handler != signal.getsignal(number):
                signal.signal(number, handler)
    return Finished(code, out.getvalue(), err.getvalue())


def clean_environment(cwd: Path, **environment: str) -> dict[str, str]:
    """This process's, without what a job scheduler would add, and with a cache of the test's own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "WANDB_"))}
    root = str(Path(__file__).parents[2])
    return {**kept, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache"), "PYTHONPATH": root, **environment}


def write_corpus(folder: Path) -> str:
    """A few kilobytes of text; returns the override that trains on it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        lines = [f"line {i} of file {number}: {'abcdefgh'[i % 8] * (i % 5)} = {i * number}" for i in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    return f"data.path={folder}"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything that equal runs share."""
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records]
