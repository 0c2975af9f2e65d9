"""make flat: memory, file handles and step time of a run of 20,000 steps, and a metrics file of a million lines.

    python -m tests.flat [--steps 20000] [--lines 1000000] [--figure docs/flat.svg]

A real est-train of a tiny model, W&B offline included, is looked at from outside, through /proc.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from est_cli.reports.records import load_runs
from est_cli.tracking.metrics import iterate_metrics, truncate
from tests.commands.cli import TINY, clean_environment, metrics, write_corpus

LOOK_EVERY_S = 0.25
WARM = 0.3
"""Share of the run that is left out: stages 1 and 2 lie in it, with their own slots and times."""


def train(folder: Path, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Looks at a run [n, 3]: step, megabytes, file handles; and the seconds of each of its steps."""
    write_corpus(folder / "corpus")
    overrides = (
        *TINY, "model.n_layers=2", "logger=wandb", "data=text", "data.path=corpus", f"trainer.max_steps={steps}",
        "scheduler.stage1_end=0.1", "scheduler.stage2_end=0.2", f"trainer.eval_every={steps // 40}",
        f"trainer.checkpoint_every={steps // 20}", "run_id=flat", "format=json",
    )  # fmt: skip
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "est_cli", *overrides], cwd=folder, stdout=output, stderr=output,
            env=clean_environment(folder),
        )  # fmt: skip
        run_dir, looks = folder / "outputs" / "est" / "flat", []
        while process.poll() is None:
            if (path := run_dir / "metrics.jsonl").exists():
                step, (rss_mb, handles) = path.read_bytes().count(b"\n") - 1, _memory_and_handles(process.pid)
                looks.append((step, rss_mb, handles))
                print(f"\r{step:>6}/{steps}  {rss_mb:.1f} MB  {handles} handles", end="", flush=True)
            time.sleep(LOOK_EVERY_S)
    print()
    if process.returncode != 0:
        sys.exit((folder / "output.txt").read_text()[-4000:])
    step_s = np.array([record["perf/step_s"] for record in metrics(run_dir)])
    return np.array([look for look in looks if look[0] < steps - 1]), step_s


def _memory_and_handles(pid: int) -> tuple[float, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    rss_kb = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
    return rss_kb / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def growth(looks: np.ndarray, step_s: np.ndarray) -> dict[str, tuple[float, float]]:
    """Medians over the first and the last tenth of the part that is looked at, by quantity."""
    medians = []
    for low, high in ((WARM, WARM + 0.1), (0.9, 1.0)):
        first, end = int(low * len(step_s)), int(high * len(step_s))
        part = looks[(first <= looks[:, 0]) & (looks[:, 0] < end)]
        medians.append((*np.median(part[:, 1:], axis=0), 1e3 * np.median(step_s[first:end])))
    return dict(zip(("memory, MB", "file handles", "step time, ms"), zip(*medians, strict=True), strict=True))


def draw(looks: np.ndarray, step_s: np.ndarray, file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    kept = looks[:: max(1, len(looks) // 200)]
    size = max(1, len(step_s) // 200)
    blocks = step_s[: len(step_s) // size * size].reshape(-1, size)
    panels = (
        ("memory (MB)", kept[:, 0], kept[:, 1]),
        ("file handles", kept[:, 0], kept[:, 2]),
        (f"step time (ms), median of {size}", np.arange(len(blocks)) * size, 1e3 * np.median(blocks, axis=1)),
    )
    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(7, 5.5), layout="constrained")
    for axis, (name, x, y) in zip(axes, panels, strict=True):
        axis.plot(x, y, linewidth=1)
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_ylim(0, 1.3 * max(y))
        for boundary in (0.1, 0.2):
            axis.axvline(boundary * len(step_s), color="0.7", linewidth=0.8)
    axes[-1].set_xlabel("step; the grey lines are stage boundaries")
    figure.savefig(file, metadata={"Date": None})


def read_lines(folder: Path, lines: int) -> dict[str, float]:
    """Seconds that each reader of metrics.jsonl takes for so many lines."""
    run_dir = folder / "outputs" / "est" / "flat"
    path = run_dir / "metrics.jsonl"
    head, sample = path.read_bytes().splitlines(keepends=True)[:1000], None
    with path.open("wb") as file:
        for number in range(lines):
            sample = head[number % len(head)]
            file.write(sample.replace(b'"step": %d,' % (number % len(head)), b'"step": %d,' % number, 1))
    seconds = {}
    for name, reader in (
        ("read, line by line", lambda: sum(1 for _ in iterate_metrics(path))),
        ("cut for a resume", lambda: truncate(path, lines)),
        ("load for a report", lambda: load_runs([run_dir])),
    ):
        started = time.perf_counter()
        reader()
        seconds[name] = time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="est-flat-") as name:
        looks, step_s = train(Path(name), arguments.steps)
        for quantity, (first, last) in growth(looks, step_s).items():
            print(f"{quantity:<14} {first:8.2f} → {last:8.2f}  ({last / first - 1:+.1%})")
        if arguments.figure:
            draw(looks, step_s, arguments.figure)
        for what, seconds in read_lines(Path(name), arguments.lines).items():
            print(f"{arguments.lines:,} lines of metrics.jsonl, {what}: {seconds:.1f} s")


if __name__ == "__main__":
    main()
