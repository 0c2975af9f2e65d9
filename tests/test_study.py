"""docs/study.md against the grid and the committed records, and its numbers on records made up here."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest

from est_cli.errors import UserError
from study import document, tables, training
from study.figures import FIGURES
from study.grid import (
    ARMS,
    FULL,
    LEARNING_RATES,
    SEEDS,
    SHORT,
    SHORTER_FULL,
    SIZES,
    SMALL,
    WARMUP,
    WINNER,
    Arm,
    Run,
    grid,
    matching,
    runs_with,
)
from study.records import ROOT, Records
from study.results import at_first_seed
from tests.commands.cli import write_corpus

FOLDER = ROOT / "docs" / "study"
COMMITTED = Records(FOLDER / "records")
DOCUMENT = (ROOT / "docs" / "study.md").read_text("utf-8")
BY_NAME = {run.name: run for run in grid()}
TEMPLATE = json.loads((FOLDER / "micro" / "headline-est-seed0.json").read_text())


def test_run_names_are_unique_and_can_be_picked_by_a_pattern():
    assert len(BY_NAME) == len(grid())
    pattern = f"*-seed{SEEDS[-1]}"
    found = runs_with(seed=SEEDS[-1])
    assert matching([pattern]) == found
    last = found[-1]
    assert matching([last.name, pattern]) == [last, *found[:-1]], "in the patterns' order, each once"


@pytest.mark.slow
def test_every_run_of_the_grid_composes_to_a_run_of_its_own():
    """Runs that differ in their seed only are composed once."""
    configs = {run: replace(training.config_of(at_seed(run, SEEDS[0])), seed=run.seed) for run in grid()}
    assert len({repr(config) for config in configs.values()}) == len(configs)
    for run, config in configs.items():
        assert run.overrides == at_seed(at_seed(run, SEEDS[0]), run.seed).overrides
        assert config.trainer.max_steps == run.steps
        if run in COMMITTED:
            COMMITTED.check(run, config)


def at_seed(run: Run, seed: int) -> Run:
    return replace(run, seed=seed, name="any", group="any")


def test_the_committed_records_are_runs_of_the_grid_on_one_text():
    assert set(COMMITTED.contents) <= set(BY_NAME)
    assert (COMMITTED.corpus is None) == (not COMMITTED.contents), "of several texts it raises"
    for name, content in COMMITTED.contents.items():
        assert content["overrides"] == list(BY_NAME[name].overrides)
        assert content["summary"]["status"] == "done"


def test_the_document_is_what_its_records_make_of_it():
    assert document.rebuilt(DOCUMENT, COMMITTED) == DOCUMENT, "run python -m study --tables"


def test_the_readmes_advice_has_the_documents_numbers():
    readme = (ROOT / "README.md").read_text("utf-8")
    advice = readme.partition("## Which schedule")[2].partition("\n## ")[0]
    numbers = re.findall(r"\d+\.\d{4}|\d+\.\d%", advice)
    assert len(numbers) > 5
    assert [number for number in numbers if number not in DOCUMENT] == []


def test_the_document_shows_every_table_and_figure():
    for name in [*tables.TABLES, *(f"figure {name}" for name in FIGURES)]:
        assert f"<!-- begin: {name} -->" in DOCUMENT
    for path in FOLDER.glob("*.svg"):
        assert f"study/{path.name}" in DOCUMENT
        assert path.stat().st_size < 80_000


def test_every_arm_has_its_best_learning_rate_or_one_that_is_as_good():
    for size, warmup in {(run.size, run.warmup) for run in grid()}:
        for arm in ARMS.values():
            losses = tables.losses_by_rate(COMMITTED, arm.name, size, warmup)
            if 1 < len(losses) == len(at_first_seed(arm, size, warmup)):
                assert losses[arm.lr_at(size, warmup)] <= min(losses.values()) + 0.001


def full_loss(share: float) -> float:
    """What the full model reaches for a share of the FLOPs: a straight line in their logarithm."""
    return 2.0 - 0.1 * math.log2(share)


Losses = Callable[[Run], tuple[float, float]]


def full_and_winner(run: Run, share: float = 0.6, loss: float = full_loss(0.8)) -> tuple[float, float]:
    """Share of the full run's FLOPs and the loss. The winner spends 60%, and is as good as the full model at 80%."""
    of_seed = 0.1 if run.seed else 0.0
    return (run.arm.length, full_loss(run.arm.length) + of_seed) if run.arm.is_full else (share, loss + of_seed)


@pytest.fixture
def records(tmp_path) -> Records:
    return Records(tmp_path / "records")


def make_up(records: Records, runs: list[Run], losses: Losses = full_and_winner) -> None:
    records.folder.mkdir(exist_ok=True)
    for run in runs:
        share, loss = losses(run)
        content = deepcopy(TEMPLATE)
        content["config"]["model"]["n_layers"] = SIZES[run.size][0]
        content["config"]["seed"] = run.seed
        half = run.steps // 2
        stages = [(0, run.steps - 1)] if run.arm.is_full else [(0, half - 1), (half, run.steps - 1)]
        content["summary"] |= {
            **{"val_loss": loss, "flops_total": share * 1e16, "steps": run.steps, "tokens": 2048 * run.steps},
            "stages": [{"first_step": first, "last_step": last} for first, last in stages],
        }
        points = np.arange(1, 5) / 4
        content["curve"] = {
            "step": (points * run.steps - 1).tolist(),
            "flops/total": (points * share * 1e16).tolist(),
            "train/loss": (3 - points).tolist(),
        }
        records.contents[run.name] = content
        (records.folder / f"{run.name}.json").write_text(json.dumps(content))


def headline_runs(*seeds: int, size: str = SMALL, group: str = "headline") -> list[Run]:
    names = (FULL, SHORTER_FULL, WINNER)
    runs = dict.fromkeys([*runs_with(group=group, size=size), *runs_with(group="headline", size=size, warmup=SHORT)])
    return [run for run in runs if run.seed in seeds and run.arm.name in names]


def row(table: str, *first: str) -> list[str]:
    """The cells after the first ones."""
    [line] = [line for line in table.splitlines() if line.startswith(f"| {' | '.join(first)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(first) :]


SAYS, TUNED = ARMS[WINNER].says, str(WARMUP[SMALL])
ASKED = len(runs_with(group="headline", size=SMALL, arm=ARMS[WINNER]))


@pytest.mark.parametrize(
    ("losses", "cells"),
    [
        # As good as the full model at 0.8 of its FLOPs; at 0.6 of them the full model is worse.
        ({}, ["0.600", f"{full_loss(0.8):.4f}", "+0.0322", "−0.0415", "25.0%", "-"]),
        # Better than the whole full run: it saves at least what it spends less.
        ({"loss": 1.9}, ["0.600", "1.9000", "−0.1000", "−0.1737", "at least 40.0%", "-"]),
        # Outside of what the full model was measured on there is no verdict.
        ({"share": 0.01, "loss": 3.0}, ["0.010", "3.0000", "+1.0000", "-", "-", "-"]),
    ],
)
def test_a_schedule_is_held_against_the_full_model_for_the_same_tokens_and_for_the_same_flops(records, losses, cells):
    make_up(records, headline_runs(0), lambda run: full_and_winner(run, **losses))
    table = tables.headline_table(records)
    assert row(table, SMALL, TUNED, SAYS) == [f"1 of {ASKED}", *cells]
    assert row(table, SMALL, TUNED, "full model")[3:] == ["-"] * 4


def test_seeds_are_paired_with_the_full_model_of_their_own(records):
    """Every arm is worse by 0.1 at the second seed, so the differences have no spread."""
    make_up(records, headline_runs(0, 1))
    cells = row(tables.headline_table(records), SMALL, TUNED, SAYS)
    assert cells[2:6] == [f"{full_loss(0.8) + 0.05:.4f} ± 0.0707", "+0.0322", "−0.0415", "25.0%"]
    said = tables.headline_says(records)
    assert "It spends 40.0% fewer FLOPs" in said
    assert "+0.0322 for the same tokens (2 seeds), and −0.0415 for the same FLOPs" in said
    assert "Saved at equal loss: 25.0% of the FLOPs." in said
    [shorter] = [run for run in headline_runs(1) if run.arm == ARMS[SHORTER_FULL]]
    del records.contents[shorter.name]
    assert row(tables.headline_table(records), SMALL, TUNED, SAYS)[4] == "−0.0415 (1 of 2)"


def test_seconds_are_steps_times_measured_step_times(records):
    make_up(records, headline_runs(0))
    times = {"cpu": "a CPU", "torch": "2", "threads": 1, SMALL: {WINNER: [0.1, 0.4]}}
    (records.folder.parent / "times.json").write_text(json.dumps(times))
    # A quarter and one of a full step's time in a half each, of 0.8 of the full run's.
    assert row(tables.headline_table(records), SMALL, TUNED, SAYS)[6] == f"{100 * (1 - 0.625 / 0.8):.1f}%"
    assert "timed on a CPU, torch 2" in tables.origins(records)


def test_what_is_missing_is_said(records):
    assert row(tables.headline_table(records), SMALL, TUNED, SAYS)[:3] == [f"0 of {ASKED}", "", "not yet run"]
    assert "not yet run" in tables.headline_says(records)
    assert f"{SAYS} ({SMALL})" in tables.screens(records).partition("Not yet run: ")[2]
    assert "not yet run" in tables.lengths(records)
    assert tables.origins(records) == "Runs: not yet run."
    asked, done, minutes = row(tables.budget(records), "all")
    assert (asked, done) == (str(len(grid())), "0")
    assert int(minutes) > 0
    assert document.drawn(records) == {}


def test_the_best_learning_rate_is_bold_and_one_at_an_edge_is_named(records):
    runs = sorted(at_first_seed(ARMS[WINNER], SMALL), key=lambda run: float(run.lr))
    make_up(records, runs, lambda run: (0.6, 2.0 - 0.01 * runs.index(run)))
    text = tables.learning_rates(records)
    best = 2.0 - 0.01 * (len(runs) - 1)
    assert row(text, SMALL, SAYS, "100")[LEARNING_RATES.index(runs[-1].lr)] == f"**{best:.4f}**"
    assert f"at an edge of the rates that were tried: {SAYS} ({SMALL}, warmup 100, {float(runs[-1].lr):g})." in text


def test_the_baselines_settings_are_held_against_the_full_model(records):
    [plain], changed = runs_with(group="headline", size=SMALL, arm=ARMS[FULL], seed=0), runs_with(group="baseline")
    make_up(records, [plain, changed[0]], lambda run: (1.0, 2.0 if run == plain else 1.9))
    assert row(tables.baseline(records), changed[0].arm.says) == ["1.9000", "−0.1000"]
    assert row(tables.baseline(records), changed[1].arm.says)[0] == tables.MISSING


def test_screens_have_the_best_rate_of_every_schedule_and_what_saves_most_first(records):
    screen = next(run for run in grid() if run.group == "screen" and run.size == SMALL and not run.arm.is_full)
    tuned, short = at_first_seed(ARMS[WINNER], SMALL), headline_runs(0, group="short")
    make_up(records, [run for run in short if run.arm.is_full])
    make_up(records, tuned, lambda run: (0.6, 2.1 + 0.01 * (run != tuned[-1])))
    make_up(records, [screen], lambda run: (0.6, 2.05))
    text = tables.screens(records)
    assert row(text, SMALL, SAYS, "100")[:3] == [f"{float(tuned[-1].lr):g}", "0.600", "2.1000"]
    # The full model needs a share of 2^-0.5 for a loss of 2.05, and 2^-1 for one of 2.1.
    assert row(text, SMALL, screen.arm.says, "100")[5] == f"{100 * (1 - 0.6 * 2**0.5):.1f}%"
    assert text.index(screen.arm.says) < text.index(SAYS)


def test_the_winner_by_tokens_a_parameter(records):
    make_up(records, headline_runs(0, group="short"))
    cells = next(line for line in tables.lengths(records).splitlines() if f"{SIZES[SMALL][2]:,}" in line).split(" | ")
    assert cells[3:] == [f"1 of {ASKED}", "2.0000", f"{full_loss(0.8):.4f}", "+0.0322", "40.0%", "25.0% |"]
    assert 9 < float(cells[1]) < 11


def test_the_headline_as_json_needs_no_torch(records):
    """At the top are the numbers of the size that most seeds are done of."""
    *_, larger = SIZES
    make_up(records, [*headline_runs(0, 1), *headline_runs(0, size=larger)])
    (records.folder.parent / "study").mkdir()
    os.rename(records.folder, records.folder.parent / "study" / "records")
    (records.folder.parent / "torch.py").write_text("raise ImportError('torch is not needed here')")
    command = [sys.executable, "-m", "study", "--headline", "--out", records.folder.parent]
    environment = {**os.environ, "PYTHONPATH": str(records.folder.parent)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    headline = json.loads(found.stdout)
    assert (headline["schedule"], headline["overrides"]) == (SAYS, list(ARMS[WINNER].overrides))
    assert (headline["size"], headline["seeds"], headline["at_least"]) == (SMALL, 2, False)
    assert headline["saved_at_equal_loss"] == pytest.approx(0.25, abs=1e-6)
    assert (headline["difference"], headline["spread"]) == pytest.approx((full_loss(0.8) - 2.0, 0.0), abs=1e-6)
    assert [(entry["size"], entry["n_layers"]) for entry in headline["sizes"]] == [
        (size, SIZES[size][0]) for size in (SMALL, larger)
    ]
    assert headline["sizes"][1]["spread"] is None, "of one seed"


def test_losses_on_different_texts_are_not_compared(records, monkeypatch):
    make_up(records, headline_runs(0))
    monkeypatch.setattr(training, "open_store", lambda *_: SimpleNamespace(fingerprint="another"))
    with pytest.raises(UserError, match="another text: the packages installed there differ"):
        training.corpus_of(training.config_of(grid()[0]), records)
    records.contents[headline_runs(0)[-1].name]["corpus"] = "another"
    with pytest.raises(UserError, match=rf"{SMALL}-full.* and {SMALL}-full.* are of different texts"):
        records.corpus  # noqa: B018


def test_the_same_records_give_the_same_figures_byte_for_byte(records, tmp_path):
    make_up(records, [*headline_runs(0), *headline_runs(0, group="short"), *at_first_seed(ARMS[WINNER], SMALL)])
    drawn = [document.draw(records, tmp_path / name) for name in "ab"]
    assert {path.stem for path in drawn[0]} == set(FIGURES)
    for a, b in zip(*drawn, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_step_times_are_of_every_stage_the_full_model_last(tmp_path):
    from study.times import step_times

    run = next(run for run in grid() if run.arm == ARMS[WINNER])
    config = training.config_of(run)
    stages = step_times(config, rounds=1)
    assert len(stages) >= len(config.scheduler.stages)
    assert min(stages) > 0


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(training, "RUNS", tmp_path / "runs")
    write_corpus(tmp_path / "corpus")
    return tmp_path


def tiny(place: Path, name: str, *overrides: str, steps: int = 4) -> Run:
    text = ("data=text", f"data.path={place / 'corpus'}", f"data.cache_dir={place / 'cache'}", "tokenizer=byte")
    small = ("trainer.batch_size=1", "trainer.log_every=1", "model.n_layers=2", "optimizer.warmup=0", "data.seq_len=32")
    return Run(name, "lr", Arm("tiny", "tiny", (*text, *small, *overrides), "8e-3"), SMALL, "8e-3", steps, 0)


@pytest.mark.slow
def test_what_trains_is_recorded_and_what_fails_stops_nothing_else(place):
    good, bad = tiny(place, "lr-good"), tiny(place, "lr-bad", "sampling.strategy=nonsense")
    records = Records(place / "records")
    assert training.train([bad, good], records, "some text", workers=2) == [bad]
    found = json.loads((place / "records" / "lr-good.json").read_text())
    assert found["corpus"] == "some text"
    assert found["curve"]["step"] == [0, 1, 2, 3]
    assert len(json.dumps(found)) < 8000
    assert "nonsense" in (place / "runs" / "lr-bad.log").read_text()

    again = Records(place / "records")
    again.check(good, training.config_of(good))
    with pytest.raises(UserError, match=r"lr-good\.json: is of another config.*\n.*optimizer\.lr"):
        again.check(good, training.config_of(tiny(place, "lr-good", "optimizer.lr=0.5")))

    (place / "records" / "lr-good.json").unlink()
    before = (place / "runs" / "lr-good" / "metrics.jsonl").stat().st_mtime_ns
    assert training.train([good], Records(place / "records"), "some text", workers=1) == []
    assert (place / "records" / "lr-good.json").exists(), "a finished folder is recorded without training again"
    assert (place / "runs" / "lr-good" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_where_it_was(place, monkeypatch):
    run, folder = tiny(place, "lr-long", steps=600), place / "runs" / "lr-long"

    def sleep_until_it_trains(seconds: float) -> None:
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
            raise KeyboardInterrupt
        sleep(0.05)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "time", SimpleNamespace(sleep=sleep_until_it_trains))
        training.train([run], Records(place / "records"), "some text", workers=1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert 0 < summary["steps"] < 600

    records = Records(place / "records")
    assert training.train([run], records, "some text", workers=1) == []
    assert records.contents["lr-long"]["summary"]["steps"] == 600
    assert f"step-{summary['steps']:08}" in (place / "runs" / "lr-long.log").read_text()
    assert len(json.loads((folder / "environment.json").read_text())["earlier_starts"]) == 1


def test_two_studies_do_not_train_at_once(place):
    with training.only_study(), pytest.raises(UserError, match="a study trains there already"):
        training.train([], Records(place / "records"), "some text", workers=1)
