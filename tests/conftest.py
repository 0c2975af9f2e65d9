"""One torch thread, set before torch is imported: tiny shapes gain nothing from more, and sums keep their order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
