"""Reports on runs, from their folders alone: no torch, no wandb."""

from est_cli.reports.records import RunRecord, load_runs
from est_cli.reports.report import FORMATS, write_report
from est_cli.reports.terminal import terminal_report

__all__ = ["FORMATS", "RunRecord", "load_runs", "terminal_report", "write_report"]
