"""Datasets that the `datasets` library reads: a hub name, or local files. A row is a document."""

import contextlib
import hashlib
import json
import logging
import os
from functools import cached_property

import numpy as np

from est_cli.config import DataConfig
from est_cli.data import Say, hub
from est_cli.data.dataset_files import FORMATS, find_dataset_files
from est_cli.data.local_rows import LocalRows
from est_cli.data.row_readers import check_column, text_bytes
from est_cli.data.text_files import path_entries, show_paths
from est_cli.errors import UserError


class HFCorpus:
    """Rows of one text column. Local files are only hashed until their rows are needed."""

    groups = None
    packages = None

    def __init__(self, data: DataConfig, say: Say = lambda _: None):
        self._data = data
        files = find_dataset_files(data, say)
        self._local = LocalRows(data, files, say) if files else None
        if self._local:
            content = self._local.fingerprint
        else:
            content = [[split._fingerprint for split in self._splits], data.name, data.split, data.val_split]
        self.fingerprint = hashlib.sha256(json.dumps([content, data.column]).encode()).hexdigest()
        self.source = describe_origin(data, bool(files))

    def __getstate__(self) -> dict:
        """For other processes: the tables are mapped again there, where the text itself would be copied."""
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_tables", "_column", "sizes", "keys")
        }

    def read(self, document: int, start: int, end: int) -> bytes:
        value = self._column[document].as_buffer()
        return b"" if value is None else value[start:end].to_pybytes()

    @cached_property
    def sizes(self) -> np.ndarray:
        import pyarrow.compute as pc

        return pc.fill_null(pc.binary_length(self._column), 0).to_numpy().astype(np.int64)

    @cached_property
    def keys(self) -> np.ndarray:
        values = (value for chunk in self._column.chunks for value in chunk.to_pylist())
        hashes = (hashlib.blake2b(value or b"", digest_size=8).digest() for value in values)
        return np.frombuffer(b"".join(hashes), dtype="<u8")

    @cached_property
    def given_val(self) -> np.ndarray | None:
        if self._data.val_split is None:
            return None
        return np.repeat([False, True], [len(table) for table in self._tables])

    @cached_property
    def _column(self):
        """The text of all splits, one after the other, memory-mapped (pyarrow.ChunkedArray)."""
        import pyarrow as pa

        return pa.chunked_array([chunk for table in self._tables for chunk in table.chunks], pa.large_binary())

    @cached_property
    def _tables(self) -> list:
        """The text of the training split, and of the validation split where one was named."""
        if self._local:
            return self._local.tables()
        return [_text_column(split.data.table, self._data.column) for split in self._splits]

    @cached_property
    def _splits(self) -> list:
        """Those of a dataset on the hub."""
        names = [name for name in (self._data.split, self._data.val_split) if name is not None]
        return [load_split(self._data, name) for name in names]


def describe_origin(data: DataConfig, local: bool) -> dict:
    """What the manifest says of a dataset."""
    revision = None if local else hub.dataset_commit(path_entries(data.path)[0], data.revision)
    return {
        "kind": "hf",
        "path": data.path,
        "name": data.name,
        "split": data.split,
        "val_split": data.val_split,
        "revision": revision,
        "column": data.column,
    }


def load_split(data: DataConfig, split: str, streaming: bool = False):
    """A split of a dataset on the hub, as the `datasets` library has it.

    Raises UserError where there is no such thing.
    """
    datasets = _import_datasets()
    options = {"name": data.name, "split": split}
    if data.cache_dir is not None:
        options["cache_dir"] = os.path.join(os.path.expanduser(data.cache_dir), "huggingface")
    name = path_entries(data.path)[0]
    _refuse_builder_name(datasets, name)
    try:
        with _cache_where_the_hub_is_silent(datasets):
            return datasets.load_dataset(name, revision=data.revision, streaming=streaming, **options)
    except Exception as error:  # The library raises what pyarrow, pandas, httpx and others raise.
        raise _explain(error, data, split) from None


def _import_datasets():
    try:
        import datasets
    except ImportError:
        raise UserError("data=hf: needs the `datasets` library (pip install datasets)") from None
    # What goes wrong is raised as well, and told once, by us.
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _refuse_builder_name(datasets, name: str) -> None:
    """`load_dataset("json")` would read whatever JSON lies in the current folder."""
    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise UserError(f"data.path={name}: must be a dataset's name on the hub, or local {FORMATS} files")


@contextlib.contextmanager
def _cache_where_the_hub_is_silent(datasets):
    """The library itself would try for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub.answers()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _text_column(table, name: str):
    check_column(name, table.column_names)
    return text_bytes(table.column(name), name)


def _explain(error: Exception, data: DataConfig, split: str) -> UserError:
    cause = error.__cause__ or error
    said = str(cause).strip().split("\n")[0] or type(cause).__name__
    path = show_paths(data.path)
    where = f"data.path={path}"
    if "split" in said and split in said:
        key = "data.split" if split == data.split else "data.val_split"
        return UserError(f"{key}={split}: {said}")
    if "BuilderConfig" in said or "Config name" in said:
        return UserError(f"data.name={data.name}: {said}")
    why = f"gives no such dataset ({said})" if hub.answers() else "could not be reached"
    return UserError(
        f"{where}: there is no such file or folder, and the Hugging Face hub {why}. On a machine that reaches the hub "
        f"run `hf download {path} --repo-type dataset --local-dir {path}` and copy the folder to {path}, below the "
        f"folder that you start from; or put it elsewhere and give data.path=FOLDER. It must hold {FORMATS} files "
        f"with a column '{data.column}'"
    )
