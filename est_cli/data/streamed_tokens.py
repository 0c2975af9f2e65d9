"""Training windows of a stream: waits for the shards that they lie in, which a thread writes ahead.

Windows follow one another in the stream and are shuffled within blocks of `BLOCK_WINDOWS`: sample n is window
permutation(block)[n % BLOCK_WINDOWS] of block n // BLOCK_WINDOWS, a pure function of (seed, n) as without streaming.
"""

import bisect
import threading
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np

from est_cli.data.batches import permute
from est_cli.data.stream_shards import ShardWriter, shard_file, shard_tokens

BLOCK_WINDOWS = 1024
_SHARDS_AHEAD = 4
_WAIT_S = 0.02


class StreamedTokens:
    """The endless training tokens of a store, as far as they were written, or wait to be."""

    def __init__(self, folder: Path, dtype: np.dtype, open_writer: Callable[[], ShardWriter]):
        """`open_writer` is called when the first shard is missing, in the thread that writes."""
        self._folder, self._dtype, self._open_writer = folder, dtype, open_writer
        self._ends: list[int] = []
        self._wanted = 0
        self._ahead = _SHARDS_AHEAD
        self._wish = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def windows(self, seq_len: int, seed: int, first: int, count: int) -> np.ndarray:
        """The `count` training samples from number `first` on, int64 [count, seq_len + 1].

        Raises what went wrong where the stream cannot be read.
        """
        blocks, places = np.divmod(first + np.arange(count, dtype=np.int64), BLOCK_WINDOWS)
        windows = blocks * BLOCK_WINDOWS + permute(places, BLOCK_WINDOWS, seed, blocks)
        return np.stack([self.read(start, start + seq_len + 1) for start in (windows * seq_len).tolist()])

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens range(start, end) of the stream, int64."""
        while not self._ends or self._ends[-1] < end:
            self._await_shard(len(self._ends))
        number = bisect.bisect_right(self._ends, start)
        parts = []
        while start < end:
            shard_start = self._ends[number - 1] if number else 0
            stop = min(end, self._ends[number])
            offset = (start - shard_start) * self._dtype.itemsize
            parts.append(np.fromfile(shard_file(self._folder, number), self._dtype, stop - start, offset=offset))
            start, number = stop, number + 1
        return np.concatenate(parts).astype(np.int64)

    def _await_shard(self, number: int) -> None:
        self._ask_for(number + 1 + self._ahead)
        while (n_tokens := shard_tokens(self._folder, number)) is None:
            if self._error is not None:
                raise self._error
            time.sleep(_WAIT_S)
        self._ends.append((self._ends[-1] if self._ends else 0) + n_tokens)

    def _ask_for(self, count: int) -> None:
        if count <= self._wanted:
            return
        self._wanted = count
        self._wish.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_ahead, daemon=True)
            self._thread.start()

    def _write_ahead(self) -> None:
        writer, number = None, 0
        try:
            while self._wish.wait():
                self._wish.clear()
                # Of several processes one writes; the others find its shards.
                with filelock.FileLock(self._folder / "stream.lock"):
                    while number < self._wanted:
                        if shard_tokens(self._folder, number) is None:
                            writer = writer or self._open_writer()
                            writer.write(number)
                        number += 1
                # Who has the dataset open goes on, and the others only step in where a shard is missing.
                self._ahead = _SHARDS_AHEAD if writer else 0
        except BaseException as error:
            self._error = error
