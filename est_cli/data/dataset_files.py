"""The local files of data=hf: which ones are read, in which order, by which reader and for which split.

A file or glob that is named holds training text. In a folder, each file belongs to the split that its path names
(`test/a.jsonl`, `a.test.jsonl`, `validation-00000-of-00002.parquet`), or to `train`; a README.md with `configs`, as
folders from the hub have, takes precedence. A folder written by `save_to_disk` is read as it was saved.
"""

import glob
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.corpora import count_files, missing, path_entries, readable_files, show_file, tell_skipped, walk
from est_cli.errors import UserError, nearest

_READERS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
FORMATS = "parquet, jsonl, json, csv, tsv, txt or arrow"

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(_SPLIT_WORDS)})(?=[-._ 0-9]|$)")
_NUMBERED = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.")
"""How the hub names the files of a split, in its folder `data`."""


@dataclass(frozen=True)
class DatasetFile:
    path: Path
    reader: str
    split: str


def find_dataset_files(data: DataConfig, say: Say) -> list[DatasetFile]:
    """The files of every split that `data.path` names, each once; none if it is a name on the hub.

    Raises UserError if a path is missing or holds nothing that can be read.
    """
    entries = path_entries(data.path)
    files: dict[str, DatasetFile] = {}
    skipped: dict[str, list[Path]] = defaultdict(list)
    for entry in entries:
        found = list(_expand(entry, data.name, skipped))
        if not found and (len(entries) > 1 or _must_be_local(entry)):
            raise missing(entry)
        for file in found:
            if os.path.realpath(file.path) in files:
                skipped["named twice"].append(file.path)
            files.setdefault(os.path.realpath(file.path), file)
    tell_skipped(skipped, say)
    return list(files.values())


def files_of_split(files: list[DatasetFile], key: str, name: str) -> list[DatasetFile]:
    """The files of a split. `key` is the setting that named it.

    Raises UserError with the splits that exist.
    """
    for alias in (name, _SPLIT_WORDS.get(name, name)):
        if chosen := [file for file in files if file.split == alias]:
            return chosen
    splits = {file.split: file for file in reversed(files)}
    there = ", ".join(f"'{split}' ({show_file(file.path)})" for split, file in sorted(splits.items()))
    raise UserError(
        f"{key}: must be a split of the files, which is one of {there}{nearest(alias, splits)}. Files in a folder "
        "belong to the split that they are named for; files that data.path names are of 'train'"
    )


def describe_files(files: list[DatasetFile], chosen: list[DatasetFile]) -> str:
    """A line that says which of the files are read, and which belong to other splits."""
    readers = Counter(file.reader for file in chosen)
    others = Counter(file.split for file in files if file not in chosen)
    what = ", ".join(f"{count} {reader}" for reader, count in sorted(readers.items()))
    left_out = ", ".join(f"{count} of split {split}" for split, count in sorted(others.items()))
    return f"data: reads {count_files(chosen)} ({what}) in the order of their names" + (
        f"; left out: {left_out}" if left_out else ""
    )


def _expand(entry: str, name: str | None, skipped: dict[str, list[Path]]) -> Iterator[DatasetFile]:
    path = os.path.expanduser(entry)
    if os.path.isdir(path):
        files = list(_in_folder(Path(path), name, skipped))
        if not files:
            raise UserError(f"data.path={entry}: the folder holds no {FORMATS} files")
        yield from files
        return
    is_file = os.path.isfile(path)
    matches = [Path(path)] if is_file else _glob(path)
    if name is not None and matches:
        raise UserError(f"data.name={name}: must be null for files; it names a part of a dataset on the hub")
    if is_file and reader_of(matches[0]) is None:
        raise UserError(f"data.path={entry}: must be {FORMATS} files (also {', '.join(sorted(COMPRESSIONS))})")
    files = list(_readable(matches, skipped))
    if matches and not files:
        raise UserError(f"data.path={entry}: matches no {FORMATS} files")
    yield from (DatasetFile(file, reader_of(file), "train") for file in files)


def _in_folder(root: Path, name: str | None, skipped: dict[str, list[Path]]) -> Iterator[DatasetFile]:
    if (root / "dataset_dict.json").is_file():
        for split in _read_json(root / "dataset_dict.json")["splits"]:
            yield from _saved(root / split, split)
    elif (root / "state.json").is_file():
        yield from _saved(root, "train")
    elif (declared := _declared(root, name)) is not None:
        for split, files in declared:
            yield from (DatasetFile(file, reader_of(file), split) for file in _readable(files, skipped))
    else:
        for file in _readable(walk(str(root)), skipped):
            yield DatasetFile(file, reader_of(file), split_of(file.relative_to(root)))


def split_of(file: Path) -> str:
    """The split that a path inside a folder names; the outermost part that names one decides. Default: `train`."""
    numbered = _NUMBERED.match(file.name)
    if numbered and file.parent.name == "data":
        return _SPLIT_WORDS.get(numbered[1], numbered[1])
    for part in file.parts:
        if word := _WORD.search(part.lower()):
            return _SPLIT_WORDS[word[1]]
    return "train"


def reader_of(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return _READERS.get(suffixes[-1]) if suffixes else None


def _readable(files: Iterable[Path], skipped: dict[str, list[Path]]) -> Iterator[Path]:
    return readable_files(files, reader_of, "of other formats", skipped)


def _saved(folder: Path, split: str) -> Iterator[DatasetFile]:
    for part in _read_json(folder / "state.json")["_data_files"]:
        yield DatasetFile(folder / part["filename"], "arrow", split)


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: cannot read {file} ({error})") from None


def _declared(root: Path, name: str | None) -> list[tuple[str, list[Path]]] | None:
    """Splits and their files, as the folder's README.md declares them for the subset `name`."""
    configs = {config["config_name"]: config for config in _configs(root)}
    if not configs:
        if name is not None:
            raise UserError(f"data.name={name}: must be null; {root} has no README.md that declares `configs`")
        return None
    if name is None:
        marked = [own for own, config in configs.items() if config.get("default")]
        name = marked[0] if marked else "default" if "default" in configs or len(configs) > 1 else next(iter(configs))
    if name not in configs:
        raise UserError(f"data.name={name}: must be one of {', '.join(configs)}{nearest(name, configs)}")
    declared = configs[name].get("data_files")
    if declared is None:
        return None
    if not isinstance(declared, list) or not all(isinstance(part, dict) for part in declared):
        declared = [{"split": "train", "path": declared}]
    return [(str(part["split"]), _matching(root, part["path"])) for part in declared]


def _configs(root: Path) -> list[dict]:
    try:
        text = (root / "README.md").read_text("utf-8", "replace")
        header = re.match(r"---\s*\n(.*?)\n---", text, re.S)
        declared = yaml.safe_load(header[1]) if header else None
    except (OSError, yaml.YAMLError):
        return []
    configs = declared.get("configs") if isinstance(declared, dict) else None
    return [config for config in configs or [] if isinstance(config, dict) and "config_name" in config]


def _matching(root: Path, patterns: str | list[str]) -> list[Path]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return [file for pattern in patterns for file in _glob(os.path.join(glob.escape(str(root)), pattern))]


def _glob(pattern: str) -> list[Path]:
    """What matches, sorted, without folders."""
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(match)]


def _must_be_local(entry: str) -> bool:
    """Whether a missing path cannot be a name on the hub: those are OWNER/NAME."""
    return bool(
        reader_of(Path(entry)) or glob.has_magic(entry) or entry.count("/") > 1 or entry.startswith((".", "~", os.sep))
    )
