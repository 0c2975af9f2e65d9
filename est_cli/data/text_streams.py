"""data.streaming=true: the texts of a dataset as they come, from any position."""

import copy
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from est_cli.config import DataConfig
from est_cli.data.hf_corpus import check_column, describe_origin, load_split, local_files
from est_cli.errors import UserError


class StreamedCorpus:
    """A dataset that is read while training goes on. Its fingerprint knows local files by name, size and time only."""

    def __init__(self, data: DataConfig):
        self._data = data
        self._files = local_files(data)
        if not self._files:
            # What the hub does not give is told now, while the caller knows which source it is.
            load_split(data, [], data.split, streaming=True)
        self.source = {**describe_origin(data, self._files), "streaming": True}
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files]
        self.fingerprint = hashlib.sha256(json.dumps([self.source, stats]).encode()).hexdigest()

    def training_texts(self) -> "TextStream":
        return TextStream(load_split(self._data, self._files, self._data.split, streaming=True), self._data.column)

    def val_texts(self) -> "TextStream":
        """Those of the source's own validation split; where none was named, the training texts."""
        split = self._data.val_split or self._data.split
        return TextStream(load_split(self._data, self._files, split, streaming=True), self._data.column)


class TextStream:
    """The texts of a dataset, empty ones left out. It starts again where it ends."""

    def __init__(self, dataset: Any, column: str):
        """`dataset` is an IterableDataset of the `datasets` library."""
        self._dataset = dataset
        self._column = column
        self._start = copy.deepcopy(dataset.state_dict())
        self._pass = self._texts()

    def one_pass(self) -> Iterator[str]:
        """All texts once, from the position on."""
        return self._pass

    def next(self, count: int) -> list[str]:
        """The next texts: at least one, at most `count`; a pass ends a list.

        Raises UserError where the whole dataset holds none.
        """
        for _ in range(2):
            texts = [text for _, text in zip(range(count), self._pass, strict=False)]
            if texts:
                return texts
            self._dataset.load_state_dict(self._start)
            self._pass = self._texts()
        raise UserError("data=hf: holds no text")

    def position(self) -> dict:
        """Plain data that `go_to` understands."""
        return copy.deepcopy(self._dataset.state_dict())

    def go_to(self, position: dict) -> None:
        self._dataset.load_state_dict(position)
        self._pass = self._texts()

    def _texts(self) -> Iterator[str]:
        for row in self._dataset:
            check_column(self._column, list(row))
            text = row[self._column]
            if not isinstance(text, str | None):
                raise UserError(
                    f"data.column={self._column}: must be a column of text, and holds {type(text).__name__}"
                )
            if text:
                yield text
