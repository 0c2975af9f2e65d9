"""The local files of data=hf: which are read, in which order, by which reader, for which split, and what is left out.

A file or glob that is named holds training text. In a folder each file belongs to the split that a part of its path
names (`test/a.jsonl`, `a.test.jsonl`, `validation-00000-of-00002.parquet`), and to `train` where none does; a README.md
with `configs`, as folders from the hub have, decides instead. A folder of `save_to_disk` is read as it was saved.
"""

import glob
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from est_cli.config import DataConfig
from est_cli.data import Say
from est_cli.data.text_files import missing, path_entries, walk
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
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_WORD = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(_SPLIT_WORDS)})(?=[-._ 0-9]|$)")
_NUMBERED = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.")
"""What the hub calls the files of a split, in its folder `data`."""


@dataclass(frozen=True)
class DatasetFile:
    path: Path
    reader: str
    split: str


def find_dataset_files(data: DataConfig, say: Say) -> list[DatasetFile]:
    """The files that `data.path` names, of every split, each once; none where it is a name on the hub.

    Raises UserError where a path is missing, or holds nothing that can be read.
    """
    entries = path_entries(data.path)
    files: dict[str, DatasetFile] = {}
    left_out: dict[str, list[Path]] = defaultdict(list)
    for entry in entries:
        found = list(_expand(entry, data.name, left_out))
        if not found and (len(entries) > 1 or _must_be_local(entry)):
            raise missing(entry)
        for file in found:
            if os.path.realpath(file.path) in files:
                left_out["named twice"].append(file.path)
            files.setdefault(os.path.realpath(file.path), file)
    for reason, group in left_out.items():
        say(f"data.path: left out {_count(group)}, {reason}, such as {_shown(group[0])}")
    return list(files.values())


def files_of_split(files: list[DatasetFile], key: str, name: str) -> list[DatasetFile]:
    """The files of a split; raises UserError with the splits that there are. `key` is what was typed for it."""
    chosen = [file for file in files if file.split == name]
    if not chosen:
        name = _SPLIT_WORDS.get(name, name)
        chosen = [file for file in files if file.split == name]
    if chosen:
        return chosen
    splits = {file.split: file for file in reversed(files)}
    there = ", ".join(f"'{split}' ({_shown(file.path)})" for split, file in sorted(splits.items()))
    raise UserError(
        f"{key}: must be a split of the files, which is one of {there}{nearest(name, splits)}. Files in a folder "
        "belong to the split that they are named for; files that data.path names are of 'train'"
    )


def describe_files(files: list[DatasetFile], chosen: list[DatasetFile]) -> str:
    """A line on what is read of the files, and what is of other splits."""
    readers = Counter(file.reader for file in chosen)
    others = Counter(file.split for file in files if file not in chosen)
    what = ", ".join(f"{count} {reader}" for reader, count in sorted(readers.items()))
    left_out = ", ".join(f"{count} of split {split}" for split, count in sorted(others.items()))
    return f"data: reads {_count(chosen)} ({what}) in the order of their names" + (
        f"; left out: {left_out}" if left_out else ""
    )


def _expand(entry: str, name: str | None, left_out: dict[str, list[Path]]) -> Iterator[DatasetFile]:
    path = os.path.expanduser(entry)
    if os.path.isdir(path):
        files = list(_in_folder(Path(path), name, left_out))
        if not files:
            raise UserError(f"data.path={entry}: the folder holds no {FORMATS} files")
        yield from files
        return
    is_file = os.path.isfile(path)
    matches = (
        [path] if is_file else [match for match in sorted(glob.glob(path, recursive=True)) if _is_no_folder(match)]
    )
    if name is not None and matches:
        raise UserError(f"data.name={name}: must be null for files; it names a part of a dataset on the hub")
    if is_file and reader_of(Path(path)) is None:
        raise UserError(f"data.path={entry}: must be {FORMATS} files (also {', '.join(sorted(COMPRESSIONS))})")
    files = list(_readable(map(Path, matches), left_out))
    if matches and not files:
        raise UserError(f"data.path={entry}: matches no {FORMATS} files")
    yield from (DatasetFile(file, reader_of(file), "train") for file in files)


def _in_folder(root: Path, name: str | None, left_out: dict[str, list[Path]]) -> Iterator[DatasetFile]:
    if (root / "dataset_dict.json").is_file():
        for split in _read_json(root / "dataset_dict.json")["splits"]:
            yield from _saved(root / split, split)
        return
    if (root / "state.json").is_file():
        yield from _saved(root, "train")
        return
    declared = _declared(root, name)
    if declared is not None:
        for split, files in declared:
            yield from (DatasetFile(file, reader_of(file), split) for file in _readable(files, left_out))
        return
    for file in _readable(walk(str(root)), left_out):
        yield DatasetFile(file, reader_of(file), split_of(file.relative_to(root)))


def split_of(file: Path) -> str:
    """The split that a part of a path inside a folder names, from the outermost on; `train` where none does."""
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


def _readable(files: Iterator[Path], left_out: dict[str, list[Path]]) -> Iterator[Path]:
    for file in files:
        if not file.exists():
            left_out["dead links" if file.is_symlink() else "missing"].append(file)
        elif not file.is_file():
            left_out["no ordinary files"].append(file)
        elif reader_of(file) is None:
            left_out["of other formats"].append(file)
        elif not os.access(file, os.R_OK):
            left_out["not readable for you"].append(file)
        else:
            yield file


def _saved(folder: Path, split: str) -> Iterator[DatasetFile]:
    for part in _read_json(folder / "state.json")["_data_files"]:
        yield DatasetFile(folder / part["filename"], "arrow", split)


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: cannot read {file} ({error})") from None


def _declared(root: Path, name: str | None) -> list[tuple[str, list[Path]]] | None:
    """Splits and their files as a README.md of the folder declares them for the subset `name`."""
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
    import yaml

    try:
        text = (root / "README.md").read_text("utf-8", "replace")
    except OSError:
        return []
    header = re.match(r"---\s*\n(.*?)\n---", text, re.S)
    try:
        declared = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return []
    configs = declared.get("configs") if isinstance(declared, dict) else None
    return [config for config in configs or [] if isinstance(config, dict) and "config_name" in config]


def _matching(root: Path, patterns: str | list[str]) -> list[Path]:
    matches = (
        sorted(glob.glob(os.path.join(glob.escape(str(root)), pattern), recursive=True))
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    )
    return [Path(match) for own in matches for match in own if _is_no_folder(match)]


def _is_no_folder(path: str) -> bool:
    return not os.path.isdir(path)


def _must_be_local(entry: str) -> bool:
    """Whether a path that does not exist cannot be meant for the hub, where names are OWNER/NAME."""
    return bool(
        reader_of(Path(entry)) or glob.has_magic(entry) or entry.count("/") > 1 or entry.startswith((".", "~", os.sep))
    )


def _count(files: list) -> str:
    return f"{len(files):,} file{'s' if len(files) > 1 else ''}"


def _shown(file: Path) -> str:
    return os.fsencode(file).decode("utf-8", "replace")
