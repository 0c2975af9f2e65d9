import subprocess
import sys

from est_cli.tracking.trackers import trackers_for
from tracking.simulated import run_info


def kinds(config):
    return [type(tracker).__name__ for tracker in trackers_for(config)]


def test_the_record_comes_first_and_the_display_last(tmp_path):
    assert kinds(run_info(tmp_path, kind="wandb").config) == ["MetricsFile", "WandbTracker", "Display"]
    assert kinds(run_info(tmp_path, kind="csv").config) == ["MetricsFile", "CsvTracker", "Display"]
    assert kinds(run_info(tmp_path, kind="none").config) == ["MetricsFile", "Display"]
    assert kinds(run_info(tmp_path, kind="wandb", mode="disabled").config) == ["MetricsFile", "Display"]


def test_tracking_loads_neither_torch_nor_wandb():
    modules = "est_cli.tracking.trackers, est_cli.tracking.summary"
    code = f"import sys, {modules}; print({{'torch', 'wandb', 'tensorboard'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
