"""The tensors of a checkpoint whose state the ranks share, by torch.distributed.checkpoint and its safetensors files.

  model-00002-of-00004.safetensors       what the second of four ranks holds of the weights
  optimizer-00002-of-00004.safetensors   the same of the moments and step counts

The state is copied to the host, and a thread writes the copy while training goes on: every rank writes its files and
computes their checksums, rank 0 gathers these and completes the checkpoint. The metadata of each file says where its
tensors lie in the whole ones; nothing is pickled on disk.
"""

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.futures import Future as TorchFuture

from est_cli.training.device import in_thread
from est_cli.training.files import check_names, checksum

if TYPE_CHECKING:
    from est_cli.training.checkpoint import Checkpoints

_KINDS = ("model", "optimizer")


def begin(
    checkpoints: "Checkpoints",
    step: int,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor] | None,
    facts: dict[str, Any],
    group: dist.ProcessGroup,
) -> "Future[Path | None]":
    """Checkpoints.save for DTensors, while training goes on; the tensors may change when this returns. A collective.

    The result is the checkpoint's path on rank 0. If a rank raises OSError, all get it; if one is lost, the others get
    a collective's error. Nothing else may use `group`, a gloo process group, until then.
    """
    folder = checkpoints.temporary(step)
    if dist.get_rank(group) == 0:
        checkpoints.remove_leftovers()
    dist.barrier(group)
    kinds = {**dict.fromkeys(weights, 1), **dict.fromkeys(moments or (), 2)}
    writer = _Writer(str(folder), kinds, dist.get_world_size(group), partial(checkpoints.complete, step, facts))
    state = {name: t.detach().to("cpu", copy=True) for name, t in {**weights, **(moments or {})}.items()}

    def write() -> Path | None:
        try:
            dcp.save(state, storage_writer=writer, process_group=group)
        except CheckpointException as error:
            if dist.get_rank(group) == 0:
                shutil.rmtree(folder, ignore_errors=True)  # the room is needed
            causes = [cause for cause, _ in error.failures.values()]
            raise next((cause for cause in causes if not isinstance(cause, OSError)), causes[0]) from error
        return writer.completed

    # dcp.async_save's own thread would keep a process from ending when another rank hangs.
    return in_thread(write)


class _Writer(HuggingFaceStorageWriter):
    """Writes this rank's files under our names, and completes the checkpoint on rank 0."""

    def __init__(self, folder: str, kinds: dict[str, int], n_ranks: int, complete: Callable[[dict[str, str]], Path]):
        super().__init__(folder, fqn_to_index_mapping=kinds, save_distributed=True)
        self.n_ranks, self.complete = n_ranks, complete
        self.completed: Path | None = None

    def write_data(self, plan, planner):
        """Each result gets the name of its file and its checksum, which travel to rank 0 with it."""
        rank, results, files = plan.storage_data["shard_index"], super().write_data(plan, planner).wait(), {}
        for result in results:
            written = result.storage_data.relative_path
            if written not in files:
                kind = _KINDS[self.fqn_to_index_mapping[result.index.fqn] - 1]
                path = self.path / f"{kind}-{rank:05d}-of-{self.n_ranks:05d}.safetensors"
                (self.path / written).rename(path)
                files[written] = (path.name, checksum(path))
        found: TorchFuture = TorchFuture()
        found.set_result([dataclasses.replace(r, storage_data=files[r.storage_data.relative_path]) for r in results])
        return found

    def finish(self, metadata, results) -> None:
        self.completed = self.complete(dict(result.storage_data for rank in results for result in rank))


def fill(targets: Mapping[str, Tensor], folder: Path, kind: str) -> None:
    """Read the targets, or the parts of DTensors held here, from the `kind` of file, "model" or "optimizer".

    Reads either form of a checkpoint, and no other rank need take part. Raises ValueError if names or shapes differ.
    """
    reader = HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata()
    names = {index.fqn for index, at in metadata.storage_data.items() if Path(at.relative_path).name.startswith(kind)}
    check_names({name: metadata.state_dict_metadata[name].size for name in names}, targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(dict(targets), storage_reader=reader, no_dist=True)
