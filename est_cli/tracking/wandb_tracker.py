"""logger=wandb: the training's end of `wandb_process`, which says why W&B has a process of its own."""

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from est_cli.config import as_plain
from est_cli.plugins import require_package
from est_cli.tracking.metrics import METRICS_NAME
from est_cli.tracking.tracker import RunInfo, Tracker


class WandbTracker(Tracker):
    """`say` gets the messages for people. Start it after `MetricsFile`.

    Raises UserError if wandb is not installed.
    """

    def __init__(self, say: Callable[[str], None], finish_timeout_s: float = 30.0):
        require_package("wandb", "logger=wandb", "wandb", "logger=none")
        self._say = say
        self._finish_timeout_s = finish_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None
        self._finishing = False

    def start(self, run: RunInfo) -> None:
        # The training's import path, but no wandb service of another process.
        environment = {"WANDB_ERROR_REPORTING": "false", **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("WANDB_SERVICE", None)
        try:
            job = self._job(run)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "est_cli.tracking.wandb_process"],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._send(job)
        except OSError as error:
            self._say(f"W&B could not start ({error}); training goes on, {METRICS_NAME} has every step")
            return
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Waits a bounded time until wandb has taken what is left."""
        if self._listener is None:
            return
        self._finishing = True
        try:
            self._send({"status": status, "summary": summary})
            self._process.stdin.close()
            self._process.wait(self._finish_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._say(f"W&B did not finish within {self._finish_timeout_s:.0f} s and was left behind")
        except OSError:
            self._process.wait()  # it ended earlier, and the listener has said so
        self._listener.join(timeout=1.0)
        self._listener = None

    def _job(self, run: RunInfo) -> dict[str, Any]:
        """What the process needs to know, as JSON. Stages are a mapping, so W&B can filter on each of their rates."""
        folder = run.run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        config = as_plain(run.config)
        config["scheduler"]["stages"] = {str(i): stage for i, stage in enumerate(config["scheduler"]["stages"], 1)}
        return {
            "metrics": str(run.run_dir / METRICS_NAME),
            "init": {
                **{key: config["logger"][key] for key in ("mode", "project", "entity", "group", "tags")},
                "name": f"{run.config.name}-{run.run_dir.name}",
                "id": _saved_run_id(folder / "run_id.txt"),
                "dir": str(run.run_dir),
                "notes": run.command,
                "config": config,
            },
            "finish_timeout_s": self._finish_timeout_s * 0.8,
            "patience_s": self._finish_timeout_s * 1.2,
            "system_metrics": run.config.trainer.device == "cuda",
        }

    def _send(self, message: dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _listen(self) -> None:
        process = self._process
        for line in process.stdout:
            self._say(line.rstrip("\n"))
        if process.wait() != 0 and not self._finishing:
            self._say(
                f"W&B's process ended (exit code {process.returncode}); training goes on, {METRICS_NAME} has every step"
            )


def _saved_run_id(path: Path) -> str:
    """The W&B run id of this run directory, created on first use and kept for resumed runs."""
    if not path.exists() or not path.read_text().strip():
        path.write_text(secrets.token_hex(8) + "\n")
    return path.read_text().strip()
