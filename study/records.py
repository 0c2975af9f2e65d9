"""Records: what the study keeps of a finished run, a few kilobytes of JSON that are committed.

Its keys are name, overrides, corpus, environment, config, summary and curve. `corpus` is the fingerprint of the token
files, whose text is that of the installed packages. `curve` has some forty points: what was logged there, and the mean
training loss since the point before, on text that the model had not seen.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from est_cli.composition.composer import conf_dir
from est_cli.config import TrainConfig, as_plain, read_train_config
from est_cli.errors import UserError
from est_cli.files import replacing
from est_cli.reports.records import RunRecord, load_runs
from est_cli.runs.changes import HARMLESS, changes
from est_cli.runs.directory import ENVIRONMENT
from study.grid import Run

ROOT = conf_dir().parent
_CURVE = ("step", "stage", "tokens", "flops/total", "seconds")
_POINTS = 40


class Records:
    """The records in a folder, by run name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.contents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}

    def __contains__(self, run: Run) -> bool:
        return run.name in self.contents

    def of(self, runs: list[Run]) -> list[RunRecord]:
        """Those of `runs` that are done, as the reports read runs."""
        return self.named(run.name for run in runs if run in self)

    def named(self, names: Iterable[str]) -> list[RunRecord]:
        """The same by their names."""
        return [_as_run(self.folder, self.contents[name]) for name in names]

    def loss(self, run: Run) -> float:
        """The final validation loss of a run that is done."""
        return self.contents[run.name]["summary"]["val_loss"]

    @property
    def corpus(self) -> str | None:
        """The fingerprint of the text that all runs were trained on; None if there is no run.

        Raises UserError if they were trained on several texts, because their losses cannot be compared then.
        """
        names: dict[str, str] = {}
        for name, content in self.contents.items():
            names.setdefault(content["corpus"], name)
        if len(names) > 1:
            raise UserError(f"{self.folder}: the records of {' and '.join(names.values())} are of different texts")
        return next(iter(names), None)

    def check(self, run: Run, config: TrainConfig) -> None:
        """Raises UserError if the record of `run` has another config than the grid."""
        recorded = read_record_config(self.contents[run.name]["config"])
        changed = [str(change) for change in changes(_decisive(recorded), _decisive(config))]
        if changed:
            path = self.folder / f"{run.name}.json"
            raise UserError(f"{path}: is of another config; remove it to train this run again", *changed)

    def add(self, run: Run, run_folder: Path, corpus: str) -> None:
        """Write the record of a finished run folder."""
        [found] = load_runs([run_folder])
        content = {
            "name": run.name,
            "overrides": list(run.overrides),
            "corpus": corpus,
            "environment": _environment(run_folder),
            "config": _decisive(read_train_config(found.config)),
            "summary": found.summary,
            "curve": _curve(found),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{run.name}.json") as partial:
            partial.write_text(_compact(content))
        self.contents[run.name] = content


def _as_run(folder: Path, content: dict[str, Any]) -> RunRecord:
    columns = {key: np.array(values, float) for key, values in content["curve"].items()}
    return RunRecord(content["name"], folder, content["config"], content["summary"], columns)


def read_record_config(plain: dict[str, Any]) -> TrainConfig:
    """The typed config of a record, which has no section of what decides nothing."""
    return read_train_config({"logger": {}, "checkpoint": {}, **plain})


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """The keys that a run's weights or evaluations depend on, and the arm's name."""
    plain = as_plain(config)
    for key in set(HARMLESS) - {"name", "trainer.eval_every", "trainer.eval_tokens"}:
        section, _, leaf = key.partition(".")
        del (plain[section] if leaf else plain)[leaf or section]
    return plain


def _curve(run: RunRecord) -> dict[str, list[float]]:
    """The columns at evenly spaced lines, and the mean training loss of the lines up to each."""
    lines = [part for part in np.array_split(np.arange(run.n_rows), _POINTS) if len(part)]
    last = np.array([part[-1] for part in lines])
    curve = {key: [_short(value) for value in run.column(key)[last]] for key in _CURVE}
    return {**curve, "train/loss": [_short(run.column("train/loss")[part].mean()) for part in lines]}


def _short(value: float) -> float | int:
    return int(value) if float(value).is_integer() else round(float(value), 5)


def _environment(run_folder: Path) -> dict[str, Any]:
    """Where the numbers come from, without host names and folders."""
    known = json.loads((run_folder / ENVIRONMENT).read_text())
    return {
        "git": known["git"],
        "python": known["python"],
        "torch": known["packages"].get("torch"),
        "numpy": known["packages"].get("numpy"),
        "cpu": known["machine"]["cpu"],
        "threads": known["machine"]["threads"],
    }


def _compact(content: dict[str, Any]) -> str:
    """JSON with a line for each key of the two outer levels."""

    def written(value: Any, depth: int) -> str:
        if not isinstance(value, dict) or depth == 0:
            return json.dumps(value)
        pad = " " * (3 - depth)
        lines = [f"{pad}{json.dumps(key)}: {written(inner, depth - 1)}" for key, inner in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{pad[1:]}}}"

    return written(content, 2) + "\n"
