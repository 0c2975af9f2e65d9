"""python -m study: train what the grid lacks, record it, and rebuild docs/study.md."""

import argparse
import shutil
import sys
from pathlib import Path

from est_cli.commands import entry
from est_cli.errors import UserError
from study import budget, training
from study.document import rebuild
from study.grid import Run, grid, matching
from study.records import ROOT, Records


def main() -> int:
    arguments = _arguments()
    document = arguments.out / "study.md"
    if not document.exists():
        arguments.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "docs" / "study.md", document)
    records = Records(arguments.out / "study" / "records")
    configs = {run: training.config_of(run) for run in grid()}
    for run in filter(records.__contains__, configs):
        records.check(run, configs[run])
    failed: list[Run] = []
    try:
        if not arguments.tables:
            failed = _train(matching(arguments.runs), records, arguments.workers)
    except KeyboardInterrupt:
        entry.say("stopped; the same command goes on")
        return entry.STOPPED
    finally:
        for path in rebuild(document, records):
            print(path)
    return entry.FAILED if failed else entry.DONE


def _train(runs: list[Run], records: Records, workers: int) -> list[Run]:
    if not runs:
        names = ", ".join(run.name for run in grid())
        raise UserError(f"no run has such a name; there are {names}")
    missing = [run for run in runs if run not in records]
    minutes = sum(map(budget.minutes, missing))
    print(
        f"{len(runs) - len(missing)} of {len(runs)} runs are done; about {minutes:.0f} core-minutes to go",
        file=sys.stderr,
    )
    if not missing:
        return []
    corpus = training.corpus_of(training.config_of(missing[0]), records)
    return training.train(missing, records, corpus, workers)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__.partition(": ")[2])
    parser.add_argument("runs", nargs="*", help="only runs whose names match, as in 'lr-*' 'headline-*-seed0'")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (2)")
    parser.add_argument("--tables", action="store_true", help="train nothing; rebuild tables and figures")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of study.md and study/records (docs)")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers={arguments.workers}: must be an integer of at least 1")
    return arguments


if __name__ == "__main__":
    entry.exit_with(main)
