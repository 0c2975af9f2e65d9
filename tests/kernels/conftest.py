"""Which tests of Triton's kernels this process can run.

The interpreter must be chosen before triton is imported, and then holds for the whole process. The suite leaves
that choice alone: where there is no GPU, test_interpreter.py runs test_triton_*.py in a process of their own.
"""

import os
from importlib.util import find_spec

from kernels.device import HAS_GPU

can_run = find_spec("triton") is not None and (HAS_GPU or os.environ.get("TRITON_INTERPRET") == "1")
collect_ignore_glob = [] if can_run else ["test_triton_*.py"]
