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

from est_cli.config import SamplingConfig, SchedulerConfig, as_plain
from est_cli.reports.records import RunRecord, load_runs
from est_cli.reports.report import write_report
from est_cli.subnet.flops import Ledger, config_ledger
from est_cli.subnet.schedule import StageSpec, stage_at
from est_cli.tracking.summary import summarize
from est_cli.tracking.tracker import RunInfo

NANO = replace(tiny.LLAMA, n_layers=4, n_heads=4, n_kv_heads=2, d_model=128, d_ff=384, head_dim=32)
NANO = replace(NANO, vocab_size=4096, max_seq_len=256)


def make_run(
    folder: Path, *, done=None, finished=True, eval_every=20, stages=tiny.THREE_STAGES, sampling=None, steps=300, **more
) -> Path:
    """A run of `done` steps (default: all of them); an unfinished one has no summary.json."""
    sampling = SamplingConfig(**sampling or {})
    config = tiny.train_config(NANO, sampling, seq_len=256, batch_size=16, max_steps=steps, **more)
    ends = {f"stage{i}_end": stage.end for i, stage in enumerate(stages[:-1], 1)}
    config = replace(config, scheduler=SchedulerConfig(stages, options=ends))
    run = RunInfo(folder, config, 0, config_ledger(config), "est-train")
    records = make_records(run.ledger, config.seed, steps, done, eval_every)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_plain(config), sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        how = {"status": "done", "steps": len(records), "train_s": sum(record["perf/step_s"] for record in records)}
        (folder / "summary.json").write_text(json.dumps(summarize(run, records, peak_memory_bytes=None, **how)))
    return folder


def make_records(ledger: Ledger, seed: int, steps: int, done: int | None, eval_every: int) -> list[dict]:
    noise = np.random.default_rng(seed)
    records, progress = [], 0.0
    for step in range(steps)[:done]:
        stage, flops = stage_at(ledger.stages, step), ledger.record(step)
        share = flops["flops/step"] / ledger.full.total
        progress += (0.55 + 0.45 * share) / steps
        step_s = 0.08 * (0.12 + 0.88 * share) * noise.lognormal(0, 0.06) + 0.4 * (step == stage.first_step)
        loss = 3.1 + 5.2 * math.exp(-18 * progress) + 1.1 * math.exp(-2.2 * progress)
        evaluated = (step + 1) % eval_every == 0 or step + 1 == steps
        records.append(
            {
                "step": step,
                "tokens": (step + 1) * 4096,
                "stage": stage.number,
                "train/loss": loss + 0.28 * (1 - share) + noise.normal(0, 0.06),
                "val/loss": loss + 0.04 + noise.normal(0, 0.004) if evaluated else None,
                "subnet/heads": stage.rates.heads,
                "subnet/mlp": stage.rates.mlp,
                "subnet/layers": stage.rates.layers,
                **flops,
                "perf/step_s": step_s,
                "perf/mfu": None,
            }
        )
    return records


def make_sweep(folder: Path, **options) -> Path:
    """stage1_end × stage2_end × two seeds: eight runs in one sweep directory."""
    for end1, end2, seed in itertools.product((0.1, 0.2), (0.4, 0.5), (0, 1)):
        name = f"stage1_end-{end1}_stage2_end-{end2}_seed-{seed}"
        stages = (StageSpec(end1, 0.5, 0.5, 0.5), StageSpec(end2, 0.5, 0.5), StageSpec())
        make_run(folder / name, seed=seed, stages=stages, **options)
    return folder


@pytest.fixture(scope="session")
def one(tmp_path_factory) -> RunRecord:
    return load_runs([make_run(tmp_path_factory.mktemp("one") / "20260101-abc")])[0]


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> list[RunRecord]:
    return load_runs([make_sweep(tmp_path_factory.mktemp("many") / "sweep-1", steps=120)])


@pytest.fixture(scope="session")
def one_report(one, tmp_path_factory) -> dict[str, Path]:
    """All formats, in a folder that was not there."""
    return write_report([one], tmp_path_factory.mktemp("report") / "new" / "one")


@pytest.fixture(scope="session")
def sweep_report(swept, tmp_path_factory) -> dict[str, Path]:
    return write_report(swept, tmp_path_factory.mktemp("report") / "sweep", ("html", "csv"))


@pytest.fixture
def new_run(tmp_path):
    """Makes a run in a folder of this name, and reads it."""
    return lambda name="run", **options: load_runs([make_run(tmp_path / name, **options)])[0]
