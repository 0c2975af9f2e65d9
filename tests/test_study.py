"""docs/study.md against the grid and the committed records, and its numbers on records made up here."""

import json
import re
from copy import deepcopy
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest

from est_cli.commands.arms import ARMS, EST, FULL, FULL_SAME_FLOPS
from est_cli.errors import UserError
from study import figures, tables, training
from study.document import rebuilt
from study.frontier import Frontier
from study.grid import LEARNING_RATES, LONG, TUNED, Run, grid, matching, retired
from study.records import ROOT, Records
from tests.commands.cli import write_corpus

FOLDER = ROOT / "docs" / "study"
COMMITTED = Records(FOLDER / "records")
DOCUMENT = (ROOT / "docs" / "study.md").read_text("utf-8")
BY_NAME = {run.name: run for run in grid()}
TEN_PFLOP = 1e16


def test_run_names_are_unique_and_can_be_picked_by_a_pattern():
    assert len(BY_NAME) == len(grid())
    assert {run.name for run in matching(["headline-*-seed0"])} == {f"headline-{arm}-seed0" for arm in ARMS}
    names = [run.name for run in matching(["screen-full-5*", "screen-full-*"])]
    assert names == ["screen-full-5000", "screen-full-6500"], "in the patterns' order, each once"


@pytest.mark.slow
def test_every_run_of_the_grid_composes_to_a_run_of_its_own():
    configs = {run: training.config_of(run) for run in grid()}
    assert len({repr(config) for config in configs.values()}) == len(configs)
    for run, config in configs.items():
        if run in COMMITTED:
            COMMITTED.check(run, config)
        if run.group == "headline":
            assert config.trainer.max_steps == (23_000 if FULL_SAME_FLOPS in run.name else LONG)


def test_the_committed_records_are_runs_of_the_grid_on_one_text():
    known = BY_NAME | {run.name: run for run in retired()}
    assert set(COMMITTED.contents) <= set(known)
    assert COMMITTED.corpus is not None
    for name, content in COMMITTED.contents.items():
        assert content["overrides"] == list(known[name].overrides)
        assert content["summary"]["status"] == "done"
        assert content["curve"]["val/loss"][-1] == pytest.approx(content["summary"]["val_loss"], abs=1e-5)


def test_the_document_is_what_its_records_make_of_it():
    assert rebuilt(DOCUMENT, COMMITTED) == DOCUMENT, "run python -m study --tables"


def test_the_readmes_advice_has_the_documents_numbers():
    readme = (ROOT / "README.md").read_text("utf-8")
    advice = readme.partition("## When to use EST")[2].partition("\n## ")[0]
    numbers = re.findall(r"\d+\.\d{4}|\d+\.\d%", advice)
    assert len(numbers) > 5
    assert [number for number in numbers if number not in DOCUMENT] == []


def test_the_document_shows_every_table_and_figure():
    for name in tables.TABLES:
        assert f"<!-- begin: {name} -->" in DOCUMENT
    for path in FOLDER.glob("*.svg"):
        assert f"study/{path.name}" in DOCUMENT
        assert path.stat().st_size < 80_000


def test_the_headline_has_the_best_learning_rates_once_they_are_known():
    for arm in ARMS:
        losses = {lr: COMMITTED.contents.get(f"lr-{arm}-{lr}") for lr in LEARNING_RATES}
        if None not in losses.values():
            best = min(losses, key=lambda lr: losses[lr]["summary"]["val_loss"])
            assert TUNED[arm] == best


@pytest.fixture
def made_up(tmp_path) -> Records:
    """The runs at the tuned learning rate and a few screens, with losses that are easy to reckon with."""
    records = Records(tmp_path)
    template = next(iter(COMMITTED.contents.values()))
    losses = {EST: (0.75, 2.1), FULL: (1.0, 2.0), FULL_SAME_FLOPS: (0.75, 2.2)}
    for arm, (flops, loss) in losses.items():
        _make_up(records, template, f"lr-{arm}-{TUNED[arm]}", arm, flops, loss)
    _make_up(records, template, "screen-balanced-4e-3", "study", 0.75, 1.9)
    _make_up(records, template, "screen-cyclic-4e-3", "study", 0.2, 2.1)
    return records


def _make_up(records: Records, template: dict, name: str, arm: str, flops: float, loss: float) -> None:
    content = deepcopy(template)
    content["name"], content["config"]["name"], content["config"]["seed"] = name, arm, 0
    content["summary"] |= {"val_loss": loss, "flops_total": flops * TEN_PFLOP, "flops_saved": 1 - flops}
    content["curve"]["val/loss"][-1] = loss
    records.contents[name] = content


def row(table: str, first: str) -> list[str]:
    [line] = [line for line in table.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_schedule_is_held_against_the_full_model_at_its_own_flops(made_up):
    """0.1 below the 2.2 that the full model reaches for 75% of the FLOPs."""
    table = tables.screens(made_up)
    est = row(table, "**EST")
    assert est[2:6] == ["25.0%", "2.1000", "2.2000", "−0.1000"]
    # The full model reaches 2.1 halfway between the logarithms of 0.75 and 1.
    assert est[6] == f"{100 * (1 - 0.75 / 0.75**0.5):.1f}%"


def test_a_schedule_outside_of_what_the_full_model_was_measured_on_has_no_verdict(made_up):
    table = tables.screens(made_up)
    assert row(table, "`cyclic`")[4:6] == ["-", "-"], "nobody trained the full model for so few steps"
    assert row(table, "`balanced`")[5:] == ["−0.3000", "-"], "the full model never was as good as 1.9"
    assert table.index("`balanced`") < table.index("**EST") < table.index("`cyclic`"), "the best first"
    assert "rates 0.75" in table.partition("Not yet run: ")[2]


def test_what_is_missing_is_said(made_up):
    assert row(tables.headline(made_up), "EST")[1:3] == ["0 of 3", "not yet run"]
    assert "not yet run" in tables.headline_says(made_up)
    assert all(tables.ARM_WORDS[arm] in tables.tuned_at_an_edge(made_up) for arm in ARMS)
    assert row(tables.budget_table(made_up), "learning rates")[1:3] == ["12", "3"]


def test_the_arms_in_words(made_up):
    said = tables.short_arms_say(made_up)
    assert "EST spends 25.0% fewer FLOPs, and its loss is 0.1000 (one seed: no spread is known) above" in said
    assert "For the same FLOPs its loss is 0.1000 (one seed: no spread is known) below" in said


def test_the_best_learning_rate_of_an_arm_is_bold(made_up):
    template = made_up.contents[f"lr-{EST}-{TUNED[EST]}"]
    _make_up(made_up, template, f"lr-{EST}-2e-3", EST, 0.75, 2.05)
    cells = row(tables.learning_rates(made_up), "EST")
    assert "**2.0500**" in cells
    assert "2.1000" in cells


@pytest.fixture
def long_runs(made_up) -> Records:
    """Seed 0 of the headline, and what was trained as long."""
    template = made_up.contents[f"lr-{EST}-{TUNED[EST]}"]
    runs = (
        (f"headline-{EST}-seed0", EST, 0.75, 2.1),
        (f"headline-{FULL}-seed0", FULL, 1.0, 2.0),
        (f"headline-{FULL_SAME_FLOPS}-seed0", FULL_SAME_FLOPS, 0.75, 2.2),
        (f"candidate-{FULL_SAME_FLOPS}-{TUNED[EST]}-seed0", FULL_SAME_FLOPS, 0.75, 2.3),
        ("candidate-longer-seed0", "study", 0.65, 2.15),
    )
    for name, arm, flops, loss in runs:
        _make_up(made_up, template, name, arm, flops, loss)
    return made_up


def test_long_schedules_are_held_against_the_full_model_at_the_better_of_its_rates(long_runs):
    table = tables.candidates(long_runs)
    saved = f"{100 * (1 - 0.75 / 0.75**0.5):.1f}%"
    assert row(table, "**EST")[1:] == ["1 of 3", "25.0%", "2.1000", "2.0000", "2.2000", "−0.1000", saved]
    assert row(table, "boundaries 0.2 and 0.7")[4:7] == ["2.0000", "-", "-"], "fewer FLOPs than were measured"
    assert row(table, "rates 0.75")[1:3] == ["0 of 3", "not yet run"]


def test_seeds_are_paired_with_the_full_model_of_their_own(long_runs):
    """Seed 1's full model is better by 0.1, and so is the schedule: the difference is that of seed 0."""
    template = long_runs.contents[f"lr-{EST}-{TUNED[EST]}"]
    for arm, flops, loss in ((EST, 0.75, 2.0), (FULL, 1.0, 1.9), (FULL_SAME_FLOPS, 0.75, 2.1)):
        _make_up(long_runs, template, f"headline-{arm}-seed1", arm, flops, loss)
    cells = row(tables.candidates(long_runs), "**EST")
    assert cells[1] == "2 of 3"
    assert cells[3:7] == ["2.0500 ± 0.0707", "1.9500 ± 0.0707", "2.1500 ± 0.0707", "−0.1000 ± 0.0000"]
    assert cells[7] == f"{100 * (1 - 0.75 / 0.75**0.5):.1f}%", "of the mean losses"


def test_the_schedule_that_is_kept_is_the_one_that_was_recorded():
    asked = Run("three", ("scheduler=three_quarters",))
    [recorded] = [run for run in grid() if run.name == "candidate-rates-0.75-seed0"]
    assert training.config_of(asked).scheduler.stages == training.config_of(recorded).scheduler.stages


def test_how_close_the_goal_is(long_runs):
    said = tables.goal_says(long_runs)
    assert "boundaries 0.2 and 0.7 (1 seed): 35.0% saved, loss 0.1500 above the full model's" in said
    assert f"equal loss is {100 * (1 - 0.65 / 0.75**0.75):.1f}%, by boundaries 0.2 and 0.7 (1 seed)" in said


def test_what_a_baseline_at_another_rate_would_have_said(long_runs):
    assert "2.3000 at 0.004, 2.2000 at 0.008; EST's loss is 0.2000 below the former" in tables.second_rate_says(
        long_runs
    )


def test_the_arms_by_length(long_runs):
    table = tables.lengths(long_runs)
    assert row(table, "10,000")[1:] == ["2.1000", "2.0000", "2.2000", "+0.1000", "−0.1000"]
    assert row(table, "60,000")[1:] == ["not yet run"] * 3 + ["-"] * 2


def test_records_of_two_texts_are_refused(made_up):
    made_up.contents["screen-cyclic-4e-3"]["corpus"] = "another"
    with pytest.raises(UserError, match=r"lr-est-.* and screen-cyclic-4e-3 are of different texts"):
        made_up.corpus  # noqa: B018


def test_the_frontier_is_linear_in_the_logarithm_of_the_flops_and_knows_its_ends():
    frontier = Frontier(np.array([1e12, 4e12]), np.array([3.0, 2.0]))
    assert frontier.loss_at(2e12) == pytest.approx(2.5)
    assert frontier.flops_at(2.5) == pytest.approx(2e12)
    assert np.isnan([frontier.loss_at(5e12), frontier.flops_at(1.9), frontier.flops_at(3.1)]).all()


def test_the_same_records_give_the_same_figures_byte_for_byte(made_up, tmp_path):
    drawn = [figures.draw(made_up, tmp_path / name) for name in "ab"]
    assert {path.stem for path in drawn[0]} == {"learning-rates", "short-runs", "screens"}
    for a, b in zip(*drawn, strict=True):
        assert a.read_bytes() == b.read_bytes()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(training, "RUNS", tmp_path / "runs")
    write_corpus(tmp_path / "corpus")
    return tmp_path


def tiny(place: Path, name: str, *overrides: str) -> Run:
    text = ("data=text", f"data.path={place / 'corpus'}", f"data.cache_dir={place / 'cache'}", "tokenizer=byte")
    return Run(name, ("trainer.max_steps=4", "trainer.batch_size=1", "trainer.eval_every=2", *text, *overrides))


@pytest.mark.slow
def test_what_trains_is_recorded_and_what_fails_stops_nothing_else(place):
    good, bad = tiny(place, "lr-good"), tiny(place, "lr-bad", "sampling.strategy=nonsense")
    records = Records(place / "records")
    assert training.train([bad, good], records, "some text", workers=2) == [bad]
    found = json.loads((place / "records" / "lr-good.json").read_text())
    assert found["corpus"] == "some text"
    assert found["curve"]["step"] == [1, 3]
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
    run, folder = tiny(place, "lr-long", "trainer.max_steps=1500"), place / "runs" / "lr-long"

    def sleep_until_it_trains(seconds: float) -> None:
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
            raise KeyboardInterrupt
        sleep(0.05)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "time", SimpleNamespace(sleep=sleep_until_it_trains))
        training.train([run], Records(place / "records"), "some text", workers=1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert 0 < summary["steps"] < 1500

    records = Records(place / "records")
    assert training.train([run], records, "some text", workers=1) == []
    assert records.contents["lr-long"]["summary"]["steps"] == 1500
    assert f"step-{summary['steps']:08}" in (place / "runs" / "lr-long.log").read_text()
    assert len(json.loads((folder / "environment.json").read_text())["earlier_starts"]) == 1


def test_two_studies_do_not_train_at_once(place):
    with training._only_study(), pytest.raises(UserError, match="a study trains there already"):
        training.train([], Records(place / "records"), "some text", workers=1)
