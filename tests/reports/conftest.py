"""Run folders as est-train leaves them, with numbers shaped like real training."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml

from est_cli.config import ModelConfig, SamplingConfig, SchedulerConfig, as_plain
from est_cli.reports.records import RunRecord, load_runs
from est_cli.reports.report import write_report
from est_cli.subnet.flops import Ledger, training_flops
from est_cli.subnet.plan import subnetwork
from est_cli.subnet.schedule import StageSpec, build_stages, stage_at

NANO = replace(tiny.LLAMA, n_layers=4, n_heads=4, n_kv_heads=2, d_model=128, d_ff=384, head_dim=32)
NANO = replace(NANO, vocab_size=4096, max_seq_len=256)


def make_config(*, steps=300, seed=0, stages=tiny.THREE_STAGES, name="est", sampling=None, **more) -> dict:
    config = tiny.train_config(NANO, SamplingConfig(**sampling or {}), seq_len=256, seed=seed, max_steps=steps)
    ends = {f"stage{i}_end": stage.end for i, stage in enumerate(stages[:-1], 1)}
    return as_plain(replace(config, scheduler=SchedulerConfig(stages, options=ends), name=name)) | more


def make_run(folder: Path, *, done: int | None = None, finished=True, eval_every=20, loss_offset=0.0, **config) -> Path:
    """A run of `done` steps (default: all of them); an unfinished one has no summary.json."""
    config = make_config(**config)
    records = make_records(config, done, eval_every, loss_offset)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        (folder / "summary.json").write_text(json.dumps(make_summary(records)))
    return folder


def make_records(config, done, eval_every, loss_offset) -> list[dict]:
    steps = config["trainer"]["max_steps"]
    stages = build_stages([StageSpec(**stage) for stage in config["scheduler"]["stages"]], steps)
    model, sampling = ModelConfig(**config["model"]), SamplingConfig(mlp_block=config["sampling"]["mlp_block"])
    noise = np.random.default_rng(config["seed"])
    small = [subnetwork(model, sampling, stage.rates).model for stage in stages]
    costs = tuple(training_flops(shape, 256, 4096) for shape in small)
    ledger = Ledger(stages, costs, training_flops(model, 256, 4096))
    records, progress = [], 0.0
    for step in range(steps if done is None else done):
        stage = stage_at(stages, step)
        shape, share = small[stage.number - 1], costs[stage.number - 1].total / ledger.full.total
        progress += (0.55 + 0.45 * share) / steps
        step_s = 0.08 * (0.12 + 0.88 * share) * noise.lognormal(0, 0.06) + 0.4 * (step == stage.first_step)
        loss = 3.1 + 5.2 * math.exp(-18 * progress) + 1.1 * math.exp(-2.2 * progress) + loss_offset
        evaluated = (step + 1) % eval_every == 0 or step + 1 == steps
        records.append(
            {
                "step": step,
                "tokens": (step + 1) * 4096,
                "stage": stage.number,
                "train/loss": loss + 0.28 * (1 - share) + noise.normal(0, 0.06),
                "val/loss": loss + 0.04 + noise.normal(0, 0.004) if evaluated else None,
                "subnet/heads": shape.n_heads / model.n_heads,
                "subnet/mlp": shape.d_ff / model.d_ff,
                "subnet/layers": shape.n_layers / model.n_layers,
                **ledger.record(step),
                "perf/step_s": step_s,
                "perf/mfu": None,
            }
        )
    return records


def make_summary(records) -> dict:
    last = records[-1]
    return {key.replace("/", "_"): value for key, value in last.items() if key.startswith("flops/")} | {
        "status": "done",
        "steps": last["step"] + 1,
        "tokens": last["tokens"],
        "val_loss": next(record["val/loss"] for record in reversed(records) if record["val/loss"] is not None),
        "train_s": sum(record["perf/step_s"] for record in records),
    }


def make_sweep(folder: Path, **options) -> Path:
    """stage1_end × stage2_end × two seeds: eight runs in one sweep directory."""
    for end1, end2, seed in itertools.product((0.1, 0.2), (0.4, 0.5), (0, 1)):
        name = f"stage1_end-{end1}_stage2_end-{end2}_seed-{seed}"
        stages = (StageSpec(end1, 0.5, 0.5, 0.5), StageSpec(end2, 0.5, 0.5), StageSpec())
        make_run(folder / name, seed=seed, stages=stages, **options)
    return folder


@pytest.fixture(scope="session")
def one_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("one") / "20260101-abc")


@pytest.fixture(scope="session")
def sweep(tmp_path_factory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("many") / "sweep-1", steps=120)


@pytest.fixture(scope="session")
def one_report(one, tmp_path_factory) -> dict[str, Path]:
    """All formats, in a folder that was not there."""
    return write_report([one], tmp_path_factory.mktemp("report") / "new" / "one")


@pytest.fixture(scope="session")
def sweep_report(swept, tmp_path_factory) -> dict[str, Path]:
    return write_report(swept, tmp_path_factory.mktemp("report") / "sweep", ("html", "csv"))


@pytest.fixture(scope="session")
def one(one_run) -> RunRecord:
    return load_runs([one_run])[0]


@pytest.fixture(scope="session")
def swept(sweep) -> list[RunRecord]:
    return load_runs([sweep])


@pytest.fixture
def new_run():
    """make_run, for tests that need a folder of their own."""
    return make_run


@pytest.fixture
def run_of(tmp_path):
    """Makes a run and reads it."""
    return lambda **options: load_runs([make_run(tmp_path / "run", **options)])[0]
