"""Datasets and single files from the Hugging Face hub, if it can be reached, or from its local cache."""

import contextlib
import functools
import logging
import threading
from pathlib import Path

import huggingface_hub

from est_cli.config import DataConfig
from est_cli.data import disk
from est_cli.errors import UserError, first_line

_TIMEOUT_S = 4


@functools.cache
def answers() -> bool:
    """Whether the hub can be reached. Asked once: the libraries would each retry for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # What a session raises depends on the library that it wraps.
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT_S)
            answered.set()

    # Name resolution has no timeout of its own, so a thread does it and is abandoned if it takes too long.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * _TIMEOUT_S)
    return answered.is_set()


def fetch(name: str, filename: str) -> Path | None:
    """A file of the model `name`, from the cache or from the hub; None if neither has it."""
    cached = huggingface_hub.try_to_load_from_cache(name, filename)
    if isinstance(cached, str):
        return Path(cached)
    if not answers():
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, etag_timeout=_TIMEOUT_S))
    except Exception:  # No such model or file, no permission, or a lost connection.
        return None


def how_to_place(name: str, files: str, key: str) -> str:
    """What to do if the hub cannot be reached. `files` are the arguments of `hf download` after the name."""
    return (
        f"On a machine that reaches the hub run `hf download {name} {files} --local-dir {name}` and copy the folder to "
        f"{name}, below the folder that you start from; or put it elsewhere and give {key}=FOLDER"
    )


def dataset_commit(name: str, revision: str | None) -> str | None:
    """The commit of a dataset's revision; the revision itself if the hub does not tell."""
    if not answers():
        return revision
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT_S).sha
    except Exception:  # If the name is wrong, loading the dataset gives the better error.
        return revision


def load_split(data: DataConfig, split: str, streaming: bool = False):
    """A split of a dataset on the hub, as a dataset of the `datasets` library. Raises UserError if there is none."""
    import datasets  # takes a second, and only datasets on the hub need it

    # The library would log what it raises; we report it once.
    datasets.logging.set_verbosity(logging.CRITICAL)
    name = disk.path_entries(data.path)[0]
    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        # load_dataset("json") would read any JSON in the current folder.
        raise UserError(f"data.path={name}: must be a dataset's name on the hub, or local {disk.FORMATS} files")
    cache = None if data.cache_dir is None else str(disk.cache_folder(data) / "huggingface")
    # The library itself would retry for half a minute if the hub cannot be reached.
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not answers()
    try:
        return datasets.load_dataset(
            name, data.name, split=split, revision=data.revision, streaming=streaming, cache_dir=cache
        )
    except Exception as error:  # The library passes on exceptions of pyarrow, pandas, httpx and others.
        raise _explain(error, data, split) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _explain(error: Exception, data: DataConfig, split: str) -> UserError:
    said = first_line(error.__cause__ or error)
    path = disk.show_paths(data.path)
    if "split" in said and split in said:
        key = "data.split" if split == data.split else "data.val_split"
        return UserError(f"{key}={split}: {said}")
    if "BuilderConfig" in said or "Config name" in said:
        return UserError(f"data.name={data.name}: {said}")
    why = f"gives no such dataset ({said})" if answers() else "could not be reached"
    return UserError(
        f"data.path={path}: there is no such file or folder, and the Hugging Face hub {why}. "
        f"{how_to_place(path, '--repo-type dataset', 'data.path')}. It must hold {disk.FORMATS} files with a column "
        f"'{data.column}'"
    )
