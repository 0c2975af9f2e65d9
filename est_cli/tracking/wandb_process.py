"""The process that feeds Weights & Biases: `python -m est_cli.tracking.wandb_process`, started by `WandbTracker`.

Why a process: the first step does not wait for wandb to start, records cost the training nothing, and whatever
happens to wandb, its service or the network cannot reach the training. It follows metrics.jsonl, so W&B shows what
the file says, also after a resume has cut the file.

Standard input brings one JSON object at the start and one when the run has ended. If it closes without the second,
the training has died, and W&B is told so. Each line on standard output is a message for people.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import wandb

from est_cli.errors import first_line

_POLL_S = 0.5


class Ending:
    """How the run ended, read from standard input in the background."""

    status = "failed"
    summary: dict[str, Any] | None = None

    def __init__(self, lines: Iterator[str], patience_s: float):
        """Ends the process `patience_s` after the run, so a hanging wandb leaves no process behind."""
        self.known = threading.Event()
        threading.Thread(target=self._read, args=(lines, patience_s), daemon=True).start()

    def _read(self, lines: Iterator[str], patience_s: float) -> None:
        for line in lines:
            message = json.loads(line)
            self.status, self.summary = message["status"], message["summary"]
        self.known.set()
        time.sleep(patience_s)
        os._exit(1)


def track(job: dict[str, Any], ending: Ending, say: Callable[[str], None]) -> None:
    """Feeds W&B from the job's metrics file until the run has ended."""
    run = _start(job, say)
    current = Path(run.dir).parent
    for folder in current.parent.glob(f"offline-run-*-{run.id}*"):
        # metrics.jsonl has all that a killed run's folder holds, and is logged again into this one.
        if folder != current:
            shutil.rmtree(folder, ignore_errors=True)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    for record in _follow(Path(job["metrics"]), ending):
        # A resumed run logs steps again that W&B may have from before the kill, with equal values.
        if record["step"] >= run.starting_step:
            run.log({key: value for key, value in record.items() if value is not None}, step=record["step"])
    if ending.summary is not None:
        # W&B shows a mapping of stages as one summary value each, a list as one text.
        stages = {str(stage["stage"]): stage for stage in ending.summary.get("stages", ())}
        run.summary.update(ending.summary | {"stages": stages})
    if ending.status == "stopped":
        run.mark_preempting()
    run.finish(exit_code={"done": 0, "stopped": 75}.get(ending.status, 1))


def _follow(path: Path, ending: Ending) -> Iterator[dict[str, Any]]:
    """The records of a metrics file from its first line on, as they are written."""
    with path.open("rb") as file:
        ended, unfinished = False, b""
        while True:
            for line in file:
                unfinished += line
                if unfinished.endswith(b"\n"):
                    yield json.loads(unfinished)
                    unfinished = b""
            if ended:
                return
            ended = ending.known.wait(_POLL_S)


def _start(job: dict[str, Any], say: Callable[[str], None]) -> Any:
    """wandb's run: online if that is wanted and W&B answers, else offline."""
    init, training = job["init"], os.getppid()
    wanted = {
        "program": init["notes"],
        "silent": True,
        "quiet": True,
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "x_save_requirements": False,
        "x_disable_stats": not job["system_metrics"],
        "x_stats_pid": training,
        "use_dot_wandb": False,
        "finish_timeout": job["finish_timeout_s"],
        "finish_timeout_raises": True,
        # The stop button of the web page stops the training as Ctrl-C does.
        "stop_fn": lambda: os.kill(training, signal.SIGINT),
    }
    # Not every version of wandb knows all of them.
    settings = wandb.Settings(**{key: wanted[key] for key in wanted.keys() & wandb.Settings.model_fields})
    if init["mode"] == "online":
        try:
            return wandb.init(**init, resume="allow", settings=settings)
        except Exception as error:
            say(
                f"W&B cannot be reached online ({first_line(error)}): recording offline, "
                f"`wandb sync {init['dir']}/wandb/offline-run-*` uploads it"
            )
    return wandb.init(**init | {"mode": "offline"}, settings=settings)


def main() -> None:
    # Slurm sends these to every process of a job, but only the training decides when to end.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    # wandb and its service write to standard output too, which is not for people here.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def say(message: str) -> None:
        with contextlib.suppress(OSError):  # the training may be gone
            messages.write(message + "\n")

    job = json.loads(sys.stdin.readline())
    try:
        track(job, Ending(iter(sys.stdin.readline, ""), job["patience_s"]), say)
    except TimeoutError:
        say(f"W&B has not taken everything in time; `wandb sync {job['init']['dir']}/wandb/run-*` uploads the rest")
    except Exception as error:
        say(f"W&B failed ({first_line(error)}); training goes on, {Path(job['metrics']).name} has every step")
    finally:
        os._exit(0)  # wandb's own exit hooks wait for a service that may be gone


if __name__ == "__main__":
    main()
