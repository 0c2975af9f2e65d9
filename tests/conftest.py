import multiprocessing
import os
from collections import Counter
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: many tests wait for processes that they started."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests begin first, so that none of them is left for the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_sessionfinish() -> None:
    """A test that failed may have left its process."""
    for process in multiprocessing.active_children():
        process.kill()
