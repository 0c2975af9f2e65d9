import json
import math
import resource
from contextlib import contextmanager

import pytest

from est_cli.tracking.metrics import MetricsFile, iterate_metrics, to_line, truncate
from tracking.simulated import follow, record, run_info


def write(tmp_path, steps, first_step=0, say=print):
    metrics = MetricsFile(say)
    follow([metrics], run_info(tmp_path, first_step), map(record, steps))
    return metrics


def steps_in(tmp_path):
    return [read["step"] for read in iterate_metrics(tmp_path / "metrics.jsonl")]


def test_what_is_logged_is_on_disk_at_once_to_the_last_bit_and_in_order(tmp_path):
    write(tmp_path, range(5))
    records = list(iterate_metrics(tmp_path / "metrics.jsonl"))
    assert records == [record(step) for step in range(5)]
    assert all(list(read) == list(record(0)) for read in records)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_become_null(value):
    assert json.loads(to_line({"step": 0, "train/loss": value})) == {"step": 0, "train/loss": None}


@pytest.mark.parametrize(("first", "then"), [(5, range(5, 10)), (0, [])])
def test_a_resumed_run_has_every_step_once(tmp_path, first, then):
    write(tmp_path, range(8))
    write(tmp_path, then, first_step=first).finish("done", None)
    assert steps_in(tmp_path) == list(range(10 if then else 0))


@pytest.mark.parametrize("tail", [b"", to_line(record(3))[:-1], to_line(record(3))[:20], b"\0" * 40, b"\0\n"])
def test_a_tail_that_a_crash_damaged_is_cut(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    sound = b"".join(to_line(record(step)) for step in range(3))
    path.write_bytes(sound + tail)
    truncate(path, before_step=10)
    assert path.read_bytes() == sound


def test_the_reader_leaves_out_a_last_line_that_was_cut_and_names_any_other_damaged_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_line(record(0)) + to_line(record(1))[:30])
    assert list(iterate_metrics(path)) == [record(0)]
    path.write_bytes(to_line(record(0)) + b"{nonsense\n" + to_line(record(2)))
    with pytest.raises(ValueError, match="line 2"):
        list(iterate_metrics(path))


@contextmanager
def full_disk(room: int):
    """The system takes the first `room` bytes of a file and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_once_and_loses_no_line_when_there_is_room_again(tmp_path):
    messages = []
    metrics, path = write(tmp_path, [0], say=messages.append), tmp_path / "metrics.jsonl"
    with full_disk(room=path.stat().st_size + 50):
        for step in (1, 2, 3):
            metrics.log(record(step))
        assert path.read_bytes() == to_line(record(0))
    assert len(messages) == 1 and "File too large" in messages[0]
    metrics.log(record(4))
    assert steps_in(tmp_path) == list(range(5))


def test_a_run_is_not_done_while_lines_are_missing_on_disk(tmp_path):
    metrics = write(tmp_path, [0], say=lambda message: None)
    with full_disk(room=50), pytest.raises(OSError, match="File too large"):
        metrics.log(record(1))
        metrics.finish("done", None)
