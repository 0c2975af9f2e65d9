"""Reads and writes .safetensors files one tensor at a time, so that no host needs memory for a whole state.

Reading is the library's. Writing is not, which wants all tensors at once; the format is the length of the header as
eight bytes, the header as JSON, padded to a multiple of eight, and the tensors one after the other
(https://github.com/huggingface/safetensors).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

_TYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the tensors in their order, the widest types first. Raises OSError where the disk does not take them."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        assert end % tensor.element_size() == 0, "a reader expects tensors at multiples of their element"
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], path: Path) -> None:
    """Read the targets from a file, of a DTensor the columns held here; raises ValueError where it has others."""
    with safe_open(path, "pt") as file:
        if targets.keys() != set(file.keys()):
            raise ValueError(f"checkpoint and model differ in {sorted(targets.keys() ^ set(file.keys()))[:5]}")
        for name, target in targets.items():
            shape = tuple(file.get_slice(name).get_shape())
            if target.shape != shape:
                raise ValueError(f"{name} has shape {shape}, expected {tuple(target.shape)}")
            value = file.get_tensor(name)
            if hasattr(target, "to_local"):
                target, mesh = target.to_local(), target.device_mesh
                if target.dim() == 2:
                    value = value.split(target.shape[1], dim=1)[mesh.get_local_rank(mesh.ndim - 1)]
            target.copy_(value)
