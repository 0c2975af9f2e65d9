"""Where Triton's kernels are tested: compiled on a GPU, or on CPU tensors by Triton's interpreter."""

import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
