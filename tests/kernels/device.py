"""Where the kernels are tested: Triton's compiled on a GPU, or interpreted on CPU tensors; and what torch allocates."""

from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


class Allocations(TorchDispatchMode):
    """`largest` is the number of elements of the biggest tensor that an operation made under this mode.

    `known` are the tensors that were there before; a view of them, or writing into them, is no allocation.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
