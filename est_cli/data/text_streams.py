"""data.streaming=true: the texts of a dataset as they come, from any position."""

import copy
import hashlib
import json
from collections.abc import Iterator
from typing import Protocol

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.dataset_files import describe_files, find_dataset_files
from est_cli.data.hf_corpus import describe_origin, load_split
from est_cli.data.local_rows import LocalTexts, sampled_fingerprint
from est_cli.data.row_readers import check_column
from est_cli.errors import RunFailed, UserError


class StreamedCorpus:
    """A dataset that is read while training goes on. Its fingerprint knows of local files only a sample of bytes."""

    def __init__(self, data: DataConfig, say: Say = lambda _: None):
        self._data, self._say = data, say
        self._files = find_dataset_files(data, say)
        # What is missing is told now, while the caller knows which source it is.
        texts = self._open("split")
        content = None
        if self._files:
            say(describe_files(self._files, texts.files))
            content = [sampled_fingerprint(own.files) for own in (texts, self._open("val_split")) if own]
        self.source = {**describe_origin(data, bool(self._files)), "streaming": True}
        identity = [content, data.column] if content else self.source
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def training_texts(self) -> "TextStream":
        return TextStream(self._open("split"), self._say)

    def val_texts(self) -> "TextStream":
        """Those of the source's own validation split; where none was named, the training texts."""
        return TextStream(self._open("val_split") or self._open("split"), self._say)

    def _open(self, key: str) -> "Texts | None":
        split = getattr(self._data, key)
        if split is None:
            return None
        if self._files:
            return LocalTexts(self._data, self._files, key, self._say)
        return HubTexts(self._data, split)


class Texts(Protocol):
    """Iterates over texts (None for a row without) from a position on, which is plain data."""

    def __iter__(self) -> Iterator[bytes | str | None]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class HubTexts:
    """Those of a dataset on the hub."""

    def __init__(self, data: DataConfig, split: str):
        self._path, self._column = data.path, data.column
        self._dataset = load_split(data, split, streaming=True)
        self.state_dict, self.load_state_dict = self._dataset.state_dict, self._dataset.load_state_dict

    def __iter__(self) -> Iterator[str | None]:
        try:
            for row in self._dataset:
                check_column(self._column, list(row))
                text = row[self._column]
                if not isinstance(text, str | None):
                    raise UserError(
                        f"data.column={self._column}: must be a column of text, and holds {type(text).__name__}"
                    )
                yield text
        except UserError:
            raise
        except Exception as error:  # The library raises what pyarrow, httpx and others raise.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise RunFailed(f"data.path={self._path}: the stream broke off ({reason})") from None


class TextStream:
    """The texts of a dataset, empty ones left out. It starts again where it ends."""

    def __init__(self, dataset: Texts, say: Say):
        self._dataset, self._say = dataset, say
        self._told = False
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
        for text in self._dataset:
            if text:
                yield self._decoded(text) if isinstance(text, bytes) else text

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            if not self._told:
                self._say("data: the stream holds invalid UTF-8, which is replaced by U+FFFD; this is told once")
            self._told = True
            return text.decode("utf-8", "replace")
