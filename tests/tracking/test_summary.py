"""summary.json, and the table that a run ends with."""

import io

import pytest
from rich.console import Console

from est_cli.tracking.summary import stage_table, summarize
from tracking.simulated import TOKENS_PER_STEP, record, run_info

KEYS = (
    "status steps tokens val_loss flops_total flops_full_total flops_saved flops_saved_blocks train_s "
    "peak_memory_bytes skipped_steps stages"
)
STAGE_KEYS = "stage first_step last_step flops saved step_s_median tokens_per_s"


def finished(tmp_path, steps=30, every=1, records=None, **how):
    default = (record(step, val_loss=3.5 if step == 20 else None) for step in range(0, steps, every))
    how = {"status": "done", "train_s": 123.0, "peak_memory_bytes": 2**30, **how}
    return summarize(run_info(tmp_path), records or default, steps=steps, **how)


def test_a_summary_has_the_keys_of_the_contract_and_the_totals_of_the_last_record(tmp_path):
    summary, last = finished(tmp_path), record(29)
    assert " ".join(summary) == KEYS and " ".join(summary["stages"][0]) == STAGE_KEYS
    for name in ("total", "full_total", "saved", "saved_blocks"):
        assert summary[f"flops_{name}"] == pytest.approx(last[f"flops/{name}"], rel=1e-12)
    assert (summary["tokens"], summary["val_loss"]) == (last["tokens"], 3.5)


def test_steps_that_were_not_logged_count(tmp_path):
    all_steps, every_seventh = finished(tmp_path), finished(tmp_path, every=7)
    for key in ("tokens", "flops_total", "flops_saved", "flops_saved_blocks"):
        assert every_seventh[key] == all_steps[key]


def test_a_stopped_run_ends_within_a_stage(tmp_path):
    stages = finished(tmp_path, steps=9, status="stopped")["stages"]
    assert [(stage["first_step"], stage["last_step"]) for stage in stages] == [(0, 3), (4, 8)]
    assert (stages[1]["flops"], stages[1]["saved"]) == (5 * 5e12, pytest.approx(4 / 9))


def test_the_median_step_leaves_out_the_first_of_a_stage(tmp_path):
    records = [{**record(step), "perf/step_s": 10.0 if step < 2 else 0.5 + step} for step in range(4)]
    [stage] = finished(tmp_path, steps=4, records=records)["stages"]
    assert (stage["step_s_median"], stage["tokens_per_s"]) == (3.5, TOKENS_PER_STEP / 3.5)


def test_a_run_that_was_stopped_before_its_first_step_has_a_summary(tmp_path):
    summary = finished(tmp_path, steps=0, status="stopped")
    assert summary["stages"] == [] and summary["flops_saved"] == 0.0 and summary["val_loss"] is None
    Console(file=io.StringIO()).print(stage_table(summary))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_shows_every_number_in_any_window(tmp_path, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(stage_table(finished(tmp_path)))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for word in ("12.0", "TFLOP", "66.7%", "30.0", "ms", "2.13k", "3.5000", "206", "23.7%", "26.7%", "2:03", "1.92k"):
        assert word in words
