"""logger=csv: metrics.csv, for spreadsheets and for pandas.read_csv. An empty cell is a null of metrics.jsonl."""

import csv
from pathlib import Path
from typing import IO

from est_cli.tracking.file_tracker import FileTracker
from est_cli.tracking.tracker import Record

CSV_NAME = "metrics.csv"


class CsvTracker(FileTracker):
    _file: IO[str]

    def _open(self, run_dir: Path) -> None:
        self._file = (run_dir / CSV_NAME).open("w", newline="", buffering=1)
        self._rows: csv.DictWriter | None = None

    def _write(self, record: Record) -> None:
        if self._rows is None:
            self._rows = csv.DictWriter(self._file, list(record), lineterminator="\n")
            self._rows.writeheader()
        self._rows.writerow(record)

    def _close(self) -> None:
        self._file.close()
