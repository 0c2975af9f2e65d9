"""A run in its directory: begin or continue, train, end, and say what was saved, or what went wrong."""

from est_cli.runs.preparation import Prepared
from est_cli.training.peers import Peers


def execute(prepared: Prepared, peers: Peers) -> int:
    """Train in the run directory, which exists; returns the exit code. Only rank 0 has trackers, and writes."""
    # A launcher takes the first rank whose code is not 0 for a failure, and kills those that still write.
    with peers.wait_for_main("run"):
        return _execute(prepared, peers)

    said = []

    def write(read: ReadTensor) -> None:
        folder = prepared.directory.nonfinite
