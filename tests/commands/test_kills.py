"""SIGKILL at any moment, and the same command again: the bits of the run that was never touched."""

import signal
from pathlib import Path

import pytest

from tests.commands.cli import metrics, without_speed, write_corpus
from tests.kills import PLACES, RUN, Kill, run

STEPS = (
    "trainer.max_steps=30", "trainer.eval_every=4", "trainer.checkpoint_every=3", "trainer.eval_tokens=160",
)  # fmt: skip
"""Stage boundaries at 4 and 14; evaluations and checkpoints fall on other steps."""
KILLS = (
    Kill("in a gradient accumulation", 2), Kill("on a stage boundary", 4), Kill("in an evaluation", 7),
    Kill("in a checkpoint's file", 8), Kill("before a checkpoint's rename", 11), Kill("in the optimizer", 12),
    Kill("while an old checkpoint is removed", 14), Kill("in a line of metrics.jsonl", 17),
    Kill("in a line of metrics.jsonl", 17), Kill("after a checkpoint's rename", 20), Kill("before the summary", 30),
)  # fmt: skip
"""In this order, on one run: twice in a row at one place too, and before the first checkpoint."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_corpus(folder / "corpus")
    return folder


def final_files(run_dir: Path) -> dict[str, bytes]:
    newest = max((run_dir / "checkpoints").iterdir())
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.mark.slow
def test_a_run_that_was_killed_everywhere_ends_with_the_bits_of_one_that_was_not(place):
    assert {kill.place for kill in KILLS} == set(PLACES)
    runs = {name: place / "outputs" / "est" / name for name in ("whole", "killed")}
    assert run(place, [*RUN, *STEPS, "run_id=whole"]) == 0, (place / "output.txt").read_text()
    for kill in KILLS:
        assert run(place, [*RUN, *STEPS, "run_id=killed"], kill) == -signal.SIGKILL, kill
    assert run(place, [*RUN, *STEPS, "run_id=killed"]) == 0, (place / "output.txt").read_text()
    whole, killed = (without_speed(metrics(folder)) for folder in runs.values())
    assert [record["step"] for record in killed] == list(range(30))
    assert killed == whole
    assert final_files(runs["killed"]) == final_files(runs["whole"])
    assert len(final_files(runs["killed"])) == 2
    assert not list((runs["killed"] / "checkpoints").glob(".*"))
