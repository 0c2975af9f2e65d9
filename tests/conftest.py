import multiprocessing
import os
from pathlib import Path

import pytest

from tests.commands.cli import write_corpus

# One torch thread, set before torch is imported: tiny shapes gain nothing from more, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus in it, which the runs of a file share."""
    folder = tmp_path_factory.mktemp("place")
    write_corpus(folder / "corpus")
    return folder


def pytest_sessionfinish() -> None:
    """A test that failed may have left its process."""
    for process in multiprocessing.active_children():
        process.kill()
