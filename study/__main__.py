"""python -m study: train the runs of the grid that have no record, record them, and rebuild docs/study.md."""

import argparse
import json
import shutil
from pathlib import Path

import study  # its modules on first use: --headline needs neither torch nor matplotlib
from est_cli.commands.entry import exit_with
from est_cli.errors import DONE, FAILED, STOPPED, UserError, say
from study import training
from study.grid import Run, grid, matching
from study.records import ROOT, Records
from study.results import headline_json


def main() -> int:
    arguments = _arguments()
    document, folder = arguments.out / "study.md", arguments.out / "study"
    records = Records(folder / "records")
    if arguments.headline:
        print(json.dumps(headline_json(records)))
        return DONE
    if not document.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "docs" / "study.md", document)
    failed: list[Run] = []
    try:
        if arguments.times:
            with training.only_study():
                study.times.write_times(folder / "times.json")
        elif not arguments.tables:
            failed = _train(matching(arguments.runs), records, arguments.workers)
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return STOPPED
    finally:
        for path in study.document.rebuild(document, records):
            print(path)
    return FAILED if failed else DONE


def _train(runs: list[Run], records: Records, workers: int) -> list[Run]:
    if not runs:
        names = ", ".join(run.name for run in grid())
        raise UserError(f"no run has such a name; there are {names}")
    for run in filter(records.__contains__, runs):
        records.check(run, training.config_of(run))
    missing = [run for run in runs if run not in records]
    minutes = sum(map(training.minutes, missing))
    say(f"{len(runs) - len(missing)} of {len(runs)} runs are done; about {minutes:.0f} core-minutes to go")
    if not missing:
        return []
    corpus = training.corpus_of(training.config_of(missing[0]), records)
    return training.train(missing, records, corpus, workers)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__.partition(": ")[2])
    parser.add_argument("runs", nargs="*", help="only runs whose names match, as in 'lr-*' 'headline-*-seed0'")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (2)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tables", action="store_true", help="train nothing; rebuild tables and figures")
    what.add_argument("--headline", action="store_true", help="train nothing; print the best schedule as JSON")
    what.add_argument("--times", action="store_true", help="train nothing; measure step times, on an idle machine")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of study.md and study/records (docs)")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers={arguments.workers}: must be an integer of at least 1")
    return arguments


if __name__ == "__main__":
    exit_with(main)
