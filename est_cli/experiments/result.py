"""What has become of a sweep, read from its folder: one table of all jobs, best first, and their report."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from est_cli import reports
from est_cli.errors import BAD_INPUT, DONE, FAILED, PROBLEM, STOPPED
from est_cli.experiments.verdict import Verdict
from est_cli.reports.records import load_runs
from est_cli.runs.directory import CONFIG, ERROR, METRICS, RunDirectory
from est_cli.tracking.display import console_for
from est_cli.units import format_clock, format_loss, format_percent


@dataclass(frozen=True)
class JobResult:
    name: str
    error: str | None
    """What ended the last attempt, where it failed."""
    summary: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "JobResult":
        directory, error = RunDirectory(folder), folder / ERROR
        return cls(folder.name, error.read_text() if error.exists() else None, directory.summary())

    @property
    def status(self) -> str:
        return "failed" if self.error is not None else self.summary.get("status", "unfinished")

    @property
    def bad_input(self) -> bool:
        return self.error is not None and self.error.startswith(PROBLEM)

    @property
    def val_loss(self) -> float:
        """Infinite where there is none, so that such jobs come last."""
        loss = self.summary.get("val_loss") if self.error is None else None
        return math.inf if loss is None or math.isnan(loss) else loss


@dataclass(frozen=True)
class SweepResult:
    directory: Path
    jobs: tuple[JobResult, ...]
    """Lowest validation loss first."""
    swept: frozenset[str] = frozenset()
    """The keys in which the jobs differ."""
    at_a_time: int | None = None
    """How many jobs ran at a time, where that is known."""

    @classmethod
    def of(cls, directory: Path, swept: Iterable[str] = (), at_a_time: int | None = None) -> "SweepResult":
        folders = [path for path in sorted(directory.iterdir()) if (path / CONFIG).exists() or (path / ERROR).exists()]
        jobs = sorted(map(JobResult.of, folders), key=lambda job: job.val_loss)
        return cls(directory, tuple(jobs), frozenset(swept), at_a_time)

    @property
    def exit_code(self) -> int:
        """2 where every failure was bad input, 1 where one was not; without a failure 75 where a job is not done."""
        failed = [job for job in self.jobs if job.error is not None]
        if not failed:
            return DONE if all(job.status == "done" for job in self.jobs) else STOPPED
        return BAD_INPUT if all(job.bad_input for job in failed) else FAILED

    @cached_property
    def report(self) -> Path | str | None:
        """The page of all jobs; in words why there is none; None where no job has taken a step."""
        if not any((self.directory / job.name / METRICS).exists() for job in self.jobs):
            return None
        files = reports.report.try_report([self.directory], self.directory / "report")
        return files if isinstance(files, str) else files["html"]

    @cached_property
    def verdict(self) -> Verdict | None:
        """On the arms of a comparison; None where the jobs also differ in what the arms must share."""
        done = [self.directory / job.name for job in self.jobs if job.status == "done"]
        if not done or "arm" not in self.swept or self._not_shared:
            return None
        failed = [self.directory / job.name for job in self.jobs if job.status == "failed"]
        failed = [folder for folder in failed if (folder / METRICS).exists()]
        return Verdict.of(load_runs(done), self._tuned, load_runs(failed) if failed else ())

    @cached_property
    def comparison_figure(self) -> Path | None:
        """Loss against FLOPs and against time, of the runs that the verdict is on; None without a verdict or report."""
        if self.verdict is None or not isinstance(self.report, Path):
            return None
        return reports.report.write_compute_and_time(self.verdict.runs, self.report.with_name("comparison.png"))

    @property
    def _tuned(self) -> list[str]:
        """Keys that every arm of a comparison may set to what suits it."""
        return sorted(key for key in self.swept if key.startswith("optimizer."))

    @property
    def _not_shared(self) -> list[str]:
        """What the jobs differ in, and arms must not."""
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
        figure = self.comparison_figure
        if figure is None and isinstance(self.report, Path):
            figure = self.report.with_name("report.png")
        paths = {"sweep": self.directory, "figure": figure, "report": self.report}
        for name, path in paths.items():
            if path is not None:
                console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)

    def _print_table(self, console: Console) -> None:
        table = Table("job", title=f"{len(self.jobs)} jobs, best first", title_justify="left")
        for column in ("val loss", "saved", "time", "status"):
            table.add_column(column, justify="left" if column == "status" else "right", no_wrap=True)
        table.columns[0].overflow = "fold"
        for job in self.jobs:
            known = job.summary.get if job.error is None else {}.get
            table.add_row(
                job.name,
                format_loss(known("val_loss")),
                format_percent(known("flops_saved")),
                format_clock(known("train_s")),
                "failed: bad input" if job.bad_input else job.status,
            )
        console.print(table)

    def _as_dict(self) -> dict[str, Any]:
        jobs = [{**job.summary, "run_dir": str(self.directory / job.name), "name": job.name, "status": job.status,
                 "error": job.error} for job in self.jobs]  # fmt: skip
        facts: dict[str, Any] = {"sweep_dir": str(self.directory), "jobs": jobs}
        facts["report"] = None if self.report is None else str(self.report)
        if self.verdict is not None:
            facts["arms"] = self.verdict.as_dict()
            facts["at_a_time"] = self.at_a_time
        return facts
