"""Datasets that the `datasets` library reads: a hub name, or local files. A row is a document."""

import contextlib
import glob
import hashlib
import json
import logging
import os
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np

from est_cli.config import DataConfig
from est_cli.data import hub
from est_cli.data.text_files import hash_files, missing, path_entries, show_paths, walk
from est_cli.errors import UserError, nearest

_BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
_COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
_FORMATS = "parquet, jsonl, json, csv, tsv, txt or arrow"


class HFCorpus:
    """Rows of one text column. Local files are only hashed until their rows are needed."""

    groups = None
    packages = None

    def __init__(self, data: DataConfig):
        self._data = data
        self._files = local_files(data)
        if self._files:
            # Names say the format, and in a folder the split.
            digests = hash_files(self._files)
            content = [[file.name, digest.hex()] for file, digest in zip(self._files, digests, strict=True)]
        else:
            content = [split._fingerprint for split in self._splits]
        choice = [data.name, data.split, data.val_split, data.column]
        self.fingerprint = hashlib.sha256(json.dumps([content, choice]).encode()).hexdigest()
        self.source = describe_origin(data, self._files)

    def __getstate__(self) -> dict:
        """For other processes: the tables are mapped again there, where the text itself would be copied."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_column", "sizes", "keys")}

    def read(self, document: int, start: int, end: int) -> bytes:
        value = self._column[document].as_buffer()
        return value[start:end].to_pybytes()

    @cached_property
    def sizes(self) -> np.ndarray:
        import pyarrow.compute as pc

        return pc.fill_null(pc.binary_length(self._column), 0).to_numpy().astype(np.int64)

    @cached_property
    def keys(self) -> np.ndarray:
        values = (value for chunk in self._column.chunks for value in chunk.to_pylist())
        hashes = (hashlib.blake2b((value or "").encode(), digest_size=8).digest() for value in values)
        return np.frombuffer(b"".join(hashes), dtype="<u8")

    @cached_property
    def given_val(self) -> np.ndarray | None:
        if self._data.val_split is None:
            return None
        return np.repeat([False, True], [len(split) for split in self._splits])

    @cached_property
    def _column(self):
        """The text of all splits, one after the other, memory-mapped (pyarrow.ChunkedArray)."""
        import pyarrow as pa

        columns = [_text_column(split.data.table, self._data.column) for split in self._splits]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.large_string())

    @cached_property
    def _splits(self) -> list:
        """The training split, and the validation split where one was named."""
        names = [name for name in (self._data.split, self._data.val_split) if name is not None]
        return [load_split(self._data, self._files, name) for name in names]


def describe_origin(data: DataConfig, files: list[Path]) -> dict:
    """What the manifest says of a dataset."""
    revision = None if files else hub.dataset_commit(path_entries(data.path)[0], data.revision)
    return {
        "kind": "hf",
        "path": data.path,
        "name": data.name,
        "split": data.split,
        "val_split": data.val_split,
        "revision": revision,
        "column": data.column,
    }


def load_split(data: DataConfig, files: list[Path], split: str, streaming: bool = False):
    """A split of the local `files`, or where there are none of the dataset on the hub, as the library has it.

    Raises UserError where there is no such thing.
    """
    datasets = _import_datasets()
    options = {"name": data.name, "split": split}
    if data.cache_dir is not None:
        options["cache_dir"] = os.path.join(os.path.expanduser(data.cache_dir), "huggingface")
    try:
        if files:
            return _load_local(datasets, data, files, options, streaming)
        name = path_entries(data.path)[0]
        _refuse_builder_name(datasets, name)
        with _cache_where_the_hub_is_silent(datasets):
            return datasets.load_dataset(name, revision=data.revision, streaming=streaming, **options)
    except UserError:
        raise
    except Exception as error:  # The library raises what pyarrow, pandas, httpx and others raise.
        raise _explain(error, data, split, bool(files)) from None


def _import_datasets():
    try:
        import datasets
    except ImportError:
        raise UserError("data=hf: needs the `datasets` library (pip install datasets)") from None
    # What goes wrong is raised as well, and told once, by us.
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def local_files(data: DataConfig) -> list[Path]:
    """The local files that `data.path` names, or an empty list where it is a name on the hub."""
    entries = path_entries(data.path)
    files = []
    for entry in entries:
        found = _expand(entry)
        if not found and (len(entries) > 1 or _must_be_local(entry)):
            raise missing(entry)
        files += found
    return files


def _expand(entry: str) -> list[Path]:
    path = os.path.expanduser(entry)
    if os.path.isdir(path):
        files = [file for file in walk(path) if _builder(file)]
        if not files:
            raise UserError(f"data.path={entry}: the folder holds no {_FORMATS} files")
        return files
    if os.path.isfile(path):
        return [Path(path)]
    return [Path(match) for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]


def _must_be_local(entry: str) -> bool:
    """Whether a path that does not exist cannot be meant for the hub, where names are OWNER/NAME."""
    return bool(
        _builder(Path(entry)) or glob.has_magic(entry) or entry.count("/") > 1 or entry.startswith((".", "~", os.sep))
    )


def _builder(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in _COMPRESSIONS]
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _load_local(datasets, data: DataConfig, files: list[Path], options: dict, streaming: bool):
    entries = path_entries(data.path)
    folder = os.path.expanduser(entries[0])
    is_folder = len(entries) == 1 and os.path.isdir(folder)
    if is_folder and os.path.exists(os.path.join(folder, "dataset_dict.json")):
        return _as_stream(datasets.load_from_disk(folder)[options["split"]], streaming)
    if is_folder and os.path.exists(os.path.join(folder, "state.json")):
        return _as_stream(datasets.load_from_disk(folder), streaming)
    builders = Counter(_builder(file) or "" for file in files).most_common()
    if not builders[0][0] or (len(builders) > 1 and not is_folder):
        raise UserError(f"data.path={show_paths(data.path)}: must be {_FORMATS} files, all of one kind")
    builder = builders[0][0]
    if builder == "text":
        options |= {"sample_by": "document"}
    if builder == "csv" and ".tsv" in files[0].suffixes:
        options |= {"sep": "\t"}
    if is_folder:  # The library finds a folder's splits by its files' names.
        return datasets.load_dataset(folder, streaming=streaming, **options)
    return datasets.load_dataset(builder, data_files=[str(file) for file in files], streaming=streaming, **options)


def _as_stream(dataset, streaming: bool):
    return dataset.to_iterable_dataset() if streaming else dataset


def _refuse_builder_name(datasets, name: str) -> None:
    """`load_dataset("json")` would read whatever JSON lies in the current folder."""
    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise UserError(f"data.path={name}: must be a dataset's name on the hub, or local {_FORMATS} files")


@contextlib.contextmanager
def _cache_where_the_hub_is_silent(datasets):
    """The library itself would try for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub.answers()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def check_column(name: str, names: list[str]) -> None:
    if name not in names:
        raise UserError(f"data.column={name}: must be one of {', '.join(names)}{nearest(name, names)}")


def _text_column(table, name: str):
    """A column as pyarrow large_string, or UserError with the columns that there are."""
    import pyarrow as pa

    check_column(name, table.column_names)
    column = table.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise UserError(f"data.column={name}: must be a column of text, and holds {column.type}")
    return column.cast(pa.large_string())


def _explain(error: Exception, data: DataConfig, split: str, local: bool) -> UserError:
    said = str(error.__cause__ or error).strip().split("\n")[0]
    path = show_paths(data.path)
    where = f"data.path={path}"
    if "split" in said and split in said:
        key = "data.split" if split == data.split else "data.val_split"
        return UserError(f"{key}={split}: {said}")
    if "BuilderConfig" in said or "Config name" in said:
        return UserError(f"data.name={data.name}: {said}")
    if local:
        return UserError(f"{where}: cannot be read as a dataset ({said})")
    why = f"gives no such dataset ({said})" if hub.answers() else "could not be reached"
    return UserError(
        f"{where}: there is no such file or folder, and the Hugging Face hub {why}. On a machine that reaches the hub "
        f"run `hf download {path} --repo-type dataset --local-dir {path}` and copy the folder to {path}, below the "
        f"folder that you start from; or put it elsewhere and give data.path=FOLDER. It must hold {_FORMATS} files "
        f"with a column '{data.column}'"
    )
