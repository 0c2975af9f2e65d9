"""est-train -m: folders that are found again, failures that stop nothing else, and one table at the end."""

import json
import re
import signal
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from est_cli.experiments.naming import job_name, sweep_name
from est_cli.experiments.result import SweepResult
from tests.commands.cli import ON_CORPUS, Finished, Process, call, run, wait_for_steps

FAST = (*ON_CORPUS, "trainer.max_steps=15", "trainer.eval_every=0", "trainer.checkpoint_every=0", "-m")


def composed(task: list[str], fixed: tuple[str, ...] = (), params: dict[str, str] | None = None):
    """The part of Hydra's own config that names are made of."""
    dirname = {"override_dirname": {"exclude_keys": list(fixed)}}
    node = {"overrides": {"task": task}, "job": {"config": dirname}, "sweeper": {"params": params}}
    return OmegaConf.create({"hydra": node})


@pytest.fixture(scope="module")
def mixed(place) -> Finished:
    """Three jobs: one breaks, one is bad input, one works."""
    return sweep(place, "raise RuntimeError('it broke')")


@pytest.fixture(scope="module")
def mended(place, mixed) -> Finished:
    """The same command again, after the first of the two mistakes has been put right."""
    return sweep(place, "return range(total - kept, total)", figures=True)


def sweep(place: Path, sampled: str, **options: bool) -> Finished:
    (place / "mine.py").write_text(f"def sampled(draw, total, kept):\n    {sampled}\n")
    overrides = ("sampling.strategy=mine.sampled,mine.smapled,random", "seed=3", "format=json")
    return run("est-train", *FAST, *overrides, cwd=place, **options)


def statuses(done: Finished) -> dict[str, str]:
    return {job["name"]: job["status"] for job in done.json["jobs"]}


def test_failures_stop_no_other_job_and_are_shown_and_left_in_their_folders(mixed):
    jobs = {"strategy-mine.sampled": "failed", "strategy-mine.smapled": "failed", "strategy-random": "done"}
    assert statuses(mixed) == jobs
    assert mixed.json["jobs"][0]["name"] == "strategy-random"
    folder = Path(mixed.json["sweep_dir"])
    for name, what in (("sampled", "RuntimeError: it broke"), ("smapled", "sampling.strategy=mine.smapled: cannot be")):
        assert what in mixed.err
        assert what in (folder / f"strategy-mine.{name}" / "error.txt").read_text()


def test_the_exit_code_is_2_where_bad_input_is_all_that_failed(mixed, mended):
    assert (mixed.code, mended.code) == (1, 2)


@pytest.mark.parametrize(
    ("summaries", "code"),
    [(["done", "done"], 0), (["done", "stopped"], 75), (["done", None], 75)],
)
def test_a_sweep_of_which_a_job_was_stopped_elsewhere_is_not_done(tmp_path, summaries, code):
    for number, status in enumerate(summaries):
        folder = tmp_path / f"seed-{number}"
        folder.mkdir()
        (folder / "config.yaml").write_text("{}")
        if status is not None:
            (folder / "summary.json").write_text(json.dumps({"status": status, "val_loss": 1.0}))
    assert SweepResult.of(tmp_path).exit_code == code


def test_the_same_command_runs_only_what_failed_and_reports_on_all(mixed, mended):
    jobs = {"strategy-mine.sampled": "done", "strategy-mine.smapled": "failed", "strategy-random": "done"}
    assert statuses(mended) == jobs
    assert mended.json["sweep_dir"] == mixed.json["sweep_dir"]
    assert mended.err.count("done already, skipped") == 1
    times = [job["train_s"] for done in (mixed, mended) for job in done.json["jobs"] if "random" in job["name"]]
    assert times[0] == times[1]
    assert Path(mended.json["report"]).exists()
    runs = Path(mended.json["sweep_dir"], "report", "runs.csv").read_text()
    assert "strategy-random" in runs and "strategy-mine.sampled" in runs


def test_the_jobs_of_a_sweep_are_a_group_and_record_their_own_overrides(mixed):
    folder = Path(mixed.json["sweep_dir"])
    config = yaml.safe_load((folder / "strategy-random" / "config.yaml").read_text())
    assert config["logger"]["group"] == folder.name
    record = json.loads((folder / "strategy-random" / "environment.json").read_text())
    assert {"sampling.strategy=random", "seed=3"} <= set(record["overrides"])
    assert record["command"][-2:] == ["seed=3", "format=json"]


def test_a_signal_stops_the_job_and_the_sweep(place):
    process = Process("est-train", *FAST, "trainer.max_steps=2000", "seed=7,8", cwd=place)
    wait_for_steps(place / "outputs" / "est" / "sweep-seed-*" / "seed-7", 20)
    done = process.stopped(signal.SIGTERM)
    assert done.code == 75, done.err
    assert "continue with: est-train" in done.err
    folder = next((place / "outputs" / "est").glob("sweep-seed-*"))
    assert [path.parent.name for path in folder.glob("*/summary.json")] == ["seed-7"]


@pytest.mark.parametrize("mistake", ["trainer.max_step=1,2", "model=nano,nan0", "seed=[1,2"])
def test_a_sweep_that_cannot_compose_makes_no_folder(tmp_path, mistake):
    done = call("est-train", "-m", mistake, cwd=tmp_path)
    assert done.code == 2, done.err
    assert mistake.split("=")[0] in done.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (["trainer.max_steps=15", "seed=0", "scheduler.stage1_end=0.1"], "stage1_end-0.1_seed-0"),
        (["seed=0", "+arm=est"], "arm-est_seed-0"),
        (["+arm=est", "seed=0"], "arm-est_seed-0"),
    ],
)
def test_a_jobs_name_tells_what_it_does_not_share_in_any_order(task, name):
    assert job_name(composed(task, ("trainer.max_steps",))) == name


@pytest.mark.parametrize(
    "tasks",
    [
        *([[f"data.path='{value}'", "seed=1"] for value in values]
          for values in (("a/b", "a:b", "a-b"), ("x" * 300, "x" * 299 + "y"), ("Größe", "Gräße"))),
        [["a.k=1_z-2", "b.z=3"], ["a.k=1", "b.z='2_z-3'"]],
    ],
)  # fmt: skip
def test_names_of_different_jobs_differ_and_are_safe(tasks):
    names = {job_name(composed(task)) for task in tasks}
    assert len(names) == len(tasks)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) for name in names)


def test_a_sweeps_name_depends_on_the_overrides_in_any_order():
    overrides = ["scheduler.stage1_end=0.1,0.2", "seed=0,1", "model=micro"]
    name = sweep_name(composed(overrides))
    assert re.fullmatch(r"sweep-stage1_end-seed-[0-9a-f]{8}", name)
    assert name == sweep_name(composed(overrides[::-1])) != sweep_name(composed([*overrides[:-1], "model=nano"]))


def test_what_a_config_sweeps_is_part_of_the_sweeps_name():
    names = {sweep_name(composed([], params={"seed": seeds})) for seeds in ("0,1", "0,1,2")}
    assert len(names) == 2
