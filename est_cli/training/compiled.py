"""torch.compile, block by block: what it took, and where its code is kept."""

import contextlib
import os

import torch

from est_cli.model.transformer import Transformer

MOST_SIZES = 64
"""Sizes of block in one process. torch's own limit is 8, and beyond it blocks run eagerly with a warning."""


class Compiler:
    """Compiles the blocks of every stage where `wanted`. Stages whose blocks have equal sizes share the code.

    torch keeps compiled code on disk too (TORCHINDUCTOR_CACHE_DIR), where the next run finds it.
    """

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self._told = (0.0, 0, 0)

    def compile(self, model: Transformer) -> None:
        if not self.wanted:
            return
        # 2 s to import, which only a compiled run needs.
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, MOST_SIZES)
        model.compile_blocks()

    def eager(self) -> contextlib.AbstractContextManager:
        """Evaluations run eagerly: their sizes would need graphs of their own, and est-eval finds the same loss."""
        return torch.compiler.set_stance("force_eager") if self.wanted else contextlib.nullcontext()

    def news(self) -> str | None:
        """What was compiled since the last call; None if nothing was."""
        if not self.wanted:
            return None
        from torch._dynamo.utils import calculate_time_spent, counters

        found, made = (counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss"))
        now = (calculate_time_spent()["total_wall_time"], found, made)
        if now == self._told:
            return None
        seconds, found, made = (new - old for new, old in zip(now, self._told, strict=True))
        self._told = now
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torch's cache")
        return f"compiled in {seconds:.1f} s: {made} new graphs, {found} found in {cache}"
