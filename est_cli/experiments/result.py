"""The result of a sweep, read from its folder: one table of all jobs, best first, and their report."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from est_cli import reports
from est_cli.config import CONFIG_FILE
from est_cli.errors import BAD_INPUT, DONE, FAILED, STOPPED
from est_cli.experiments.verdict import Verdict
from est_cli.reports.records import load_runs
from est_cli.runs.directory import ERROR, RunDirectory
from est_cli.tracking.display import console_for
from est_cli.tracking.metrics import METRICS_NAME
from est_cli.units import format_clock, format_loss, format_percent


@dataclass(frozen=True)
class SweepResult:
    directory: Path
    jobs: tuple[RunDirectory, ...]
    """Lowest validation loss first."""
    swept: frozenset[str] = frozenset()
    """The keys in which the jobs differ."""
    at_a_time: int | None = None
    """How many jobs ran at a time, if that is known."""

    @classmethod
    def of(cls, directory: Path, swept: Iterable[str] = (), at_a_time: int | None = None) -> "SweepResult":
        folders = [
            path for path in sorted(directory.iterdir()) if (path / CONFIG_FILE).exists() or (path / ERROR).exists()
        ]
        jobs = sorted(map(RunDirectory, folders), key=lambda job: job.val_loss)
        return cls(directory, tuple(jobs), frozenset(swept), at_a_time)

    @property
    def exit_code(self) -> int:
        """1 if a job failed, or 2 if every failure was bad input; else 75 if a job is not done."""
        failed = [job for job in self.jobs if job.status == "failed"]
        if not failed:
            return DONE if all(job.is_finished for job in self.jobs) else STOPPED
        return BAD_INPUT if all(job.has_bad_input for job in failed) else FAILED

    @cached_property
    def report(self) -> Path | str | None:
        """The page of all jobs; in words why there is none; None if no job has taken a step."""
        if not any((job.path / METRICS_NAME).exists() for job in self.jobs):
            return None
        files = reports.report.try_report([self.directory], self.directory / "report")
        return files if isinstance(files, str) else files["html"]

    @cached_property
    def verdict(self) -> Verdict | None:
        """On the arms of a comparison; None if the jobs also differ in what the arms must share."""
        done = [job.path for job in self.jobs if job.status == "done"]
        if not done or "arm" not in self.swept or self._not_shared:
            return None
        failed = [job.path for job in self.jobs if job.status == "failed" and (job.path / METRICS_NAME).exists()]
        return Verdict.of(load_runs(done), self._tuned, load_runs(failed) if failed else ())

    @property
    def _tuned(self) -> list[str]:
        """Keys that every arm of a comparison may set to what suits it."""
        return sorted(key for key in self.swept if key.startswith("optimizer."))

    @property
    def _not_shared(self) -> list[str]:
        """Keys that arms must share, and in which the jobs differ."""
        return sorted(self.swept - {"arm", "seed", *self._tuned})

    def show(self, format: str) -> None:
        """A table for people; one JSON object on standard output with format=json."""
        console = console_for(format)
        if format == "json":
            print(json.dumps(self._as_dict()))
        else:
            self._print_table(console)
            if self.verdict is not None:
                self.verdict.show(console, self.at_a_time)
            elif "arm" in self.swept and self._not_shared:
                console.print(
                    f"No verdict: the jobs differ in {', '.join(self._not_shared)} too, which arms must share."
                )
        paths: dict[str, Any] = {"sweep": self.directory}
        if isinstance(self.report, Path):
            paths["figure"] = self.report.with_name("report.png")
            if self.verdict is not None:  # loss against FLOPs and against time, of the runs that it is on
                figure = self.report.with_name("comparison.png")
                paths["figure"] = reports.report.write_compute_and_time(self.verdict.runs, figure)
        if self.report is not None:
            paths["report"] = self.report
        for name, path in paths.items():
            console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)

    def _print_table(self, console: Console) -> None:
        table = Table(
            Column("job", overflow="fold"),
            *(Column(name, justify="right", no_wrap=True) for name in ("val loss", "saved", "time")),
            Column("status", no_wrap=True),
            title=f"{len(self.jobs)} jobs, best first",
            title_justify="left",
        )
        for job in self.jobs:
            known = {}.get if job.status == "failed" else job.summary().get
            table.add_row(
                job.path.name,
                format_loss(known("val_loss")),
                format_percent(known("flops_saved")),
                format_clock(known("train_s")),
                "failed: bad input" if job.has_bad_input else job.status,
            )
        console.print(table)

    def _as_dict(self) -> dict[str, Any]:
        jobs = [{**job.summary(), "run_dir": str(job.path), "name": job.path.name, "status": job.status,
                 "error": job.error()} for job in self.jobs]  # fmt: skip
        facts: dict[str, Any] = {"sweep_dir": str(self.directory), "jobs": jobs}
        facts["report"] = None if self.report is None else str(self.report)
        if self.verdict is not None:
            facts |= {"arms": [arm.facts() for arm in self.verdict.arms], "at_a_time": self.at_a_time}
        return facts
