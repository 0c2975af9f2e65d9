"""Files that are written one tensor at a time are what the safetensors library writes and reads."""

import torch
from safetensors.torch import load_file, save_file

from est_cli.training.tensor_file import write_tensors

TENSORS = {
    "counts": torch.arange(3),
    "weight": torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),
    "turned": torch.arange(6.0).view(2, 3).t(),
    "half": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
}


def bits(tensors):
    return {name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).tolist()) for name, t in tensors.items()}


def test_the_library_reads_every_type_and_shape_bit_for_bit(tmp_path):
    write_tensors(TENSORS, tmp_path / "ours")
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "theirs")
    assert bits(load_file(tmp_path / "ours")) == bits(load_file(tmp_path / "theirs")) == bits(TENSORS)
