"""Host arrays on their way to the device."""

import numpy as np
import torch
from torch import Tensor


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """The array in memory from which `device` copies without the host's help; any thread may ask."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):
        return tensor.pin_memory()


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, through pinned memory: the host does not wait for the device."""
    tensor = pinned(array, device)
    return tensor.to(device, non_blocking=True) if device.type == "cuda" else tensor
