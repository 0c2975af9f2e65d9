"""make soak: kills and resumes a run at 25 random moments and compares the bits with a run that was never touched.

    python -m tests.soak [--kills 25] [--seed 0] [--wandb]

Half of the kills come from outside at a random time, half at a random place of tests/kills.py after a random step.
A run that ends before all kills have fallen is compared, and the next one begins.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.commands.cli import Finished, metrics, without_speed, write_corpus
from tests.kills import PLACES, RUN, Kill, start
from tests.tracking.wandb_file import read_wandb_file, values

STEPS = 120
SIZES = (
    f"trainer.max_steps={STEPS}", "trainer.eval_every=7", "trainer.checkpoint_every=5", "trainer.eval_tokens=640",
)  # fmt: skip
OUTSIDE = "SIGKILL from outside, at a random time"
WAIT_S = 600.0


class Soak:
    """One sequence of kills, over as many runs as it takes."""

    def __init__(self, folder: Path, seed: int, logger: str):
        self.folder, self.random, self.logger = folder, random.Random(seed), logger
        self.fallen: Counter[str] = Counter()
        self.lost: list[str] = []
        self.seconds_per_step = 0.0

    def run(self, kills: int) -> None:
        write_corpus(self.folder / "corpus")
        started = time.monotonic()
        if (done := start(self.folder, self._overrides("whole", "none")).finished()).code != 0:
            sys.exit(done.err)
        self.seconds_per_step = (time.monotonic() - started) / STEPS
        rounds = 0
        while self.fallen.total() < kills:
            rounds += 1
            self._round(f"killed-{rounds}", kills)
            self.lost += self._differences(f"killed-{rounds}")

    def _round(self, name: str, kills: int) -> None:
        """One run, killed until it is done or all kills have fallen."""
        while True:
            place, done = self._one_life(name, self.fallen.total() < kills)
            if done.code == -signal.SIGKILL:
                self.fallen[place] += 1
                print(f"kill {self.fallen.total():>3}/{kills}  step {self._steps(name):>3}  {place}", flush=True)
            elif done.code != 0:
                sys.exit(f"exit code {done.code}:\n{done.err[-4000:]}")
            if (self._run_dir(name) / "summary.json").exists():  # also where it was killed while it wrote the report
                print(f"{name} is done", flush=True)
                return

    def _one_life(self, name: str, doomed: bool) -> tuple[str, Finished]:
        """How the process was to die, and how it ended."""
        overrides, step = self._overrides(name, self.logger), self._steps(name)
        if not doomed:
            return "", start(self.folder, overrides).finished()
        kill = Kill(self.random.choice(sorted(PLACES)), self.random.randint(step, min(step + 25, STEPS)))
        if self.random.random() < 0.5:
            return kill.place, start(self.folder, overrides, kill).finished()
        process, deadline = start(self.folder, overrides), time.monotonic() + WAIT_S
        while process.is_alive() and self._steps(name) == step and time.monotonic() < deadline:
            time.sleep(0.002)
        process.join(self.random.uniform(0, 25) * self.seconds_per_step)
        process.kill()
        return OUTSIDE, process.finished()

    def _overrides(self, name: str, logger: str) -> Sequence[str]:
        return [*RUN, *SIZES, f"run_id={name}", f"logger={logger}"]

    def _steps(self, name: str) -> int:
        """Lines of metrics.jsonl."""
        path = self._run_dir(name) / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _run_dir(self, name: str) -> Path:
        return self.folder / "outputs" / "est" / name

    def _differences(self, name: str) -> list[str]:
        """What a killed run does not share with the whole one."""
        ours, theirs = (self._run_dir(run) for run in (name, "whole"))
        checkpoint, whole = f"checkpoints/step-{STEPS:08d}", metrics(theirs)
        same = {"metrics.jsonl": without_speed(metrics(ours)) == without_speed(whole)}
        for file in (f"{checkpoint}/model.safetensors", f"{checkpoint}/optimizer.safetensors"):
            same[file] = (ours / file).read_bytes() == (theirs / file).read_bytes()
        if self.logger == "wandb":
            same["W&B's history"] = self._losses_in_wandb(name) == [(r["step"], r["train/loss"]) for r in whole]
        return [f"{name}: {what} differs" for what, is_same in same.items() if not is_same]

    def _losses_in_wandb(self, name: str) -> list[tuple[int, float]]:
        """Step and loss of every line of history; nothing unless there is one W&B run."""
        files = list(self._run_dir(name).glob("wandb/offline-run-*/*.wandb"))
        records = read_wandb_file(files[0]) if len(files) == 1 else []
        history = [values(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
        return [(entry["step"], entry["train/loss"]) for entry in history]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wandb", action="store_true", help="with W&B's offline folder, compared too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="est-soak-"))
    soak = Soak(folder, arguments.seed, "wandb" if arguments.wandb else "none")
    soak.run(arguments.kills)
    print()
    for place, count in sorted(soak.fallen.items()):
        print(f"{count:>4}  {place}")
    what = "weights, moments, metrics" + (", W&B" if arguments.wandb else "")
    print(f"{soak.fallen.total():>4}  kills; {what}: " + ("; ".join(soak.lost) or "equal bit for bit"))
    if soak.lost:
        sys.exit(f"the runs stay in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
