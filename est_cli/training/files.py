"""Files of tensors (safetensors), and checksums of files."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file, in the library's order. Raises OSError if the disk does not take it."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error
    path.chmod(mode)  # the library lets only the owner read its files


def check_names(shapes: Mapping[str, Sequence[int]], targets: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a checkpoint's tensors, of these shapes, are not the targets'."""
    if targets.keys() != shapes.keys():
        raise ValueError(f"checkpoint and model differ in {sorted(targets.keys() ^ shapes.keys())[:5]}")
    for name, target in targets.items():
        if tuple(target.shape) != tuple(shapes[name]):
            raise ValueError(f"{name} has shape {tuple(shapes[name])}, expected {tuple(target.shape)}")


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
