"""One run: its directory, and everything that begins it, continues it, or trains it again.

directory     the files that a run leaves; whether it starts, continues or is refused
changes       which keys may differ when a run continues
provenance    environment.json: code, packages and machine
rerun         a recorded config as the one that overrides change
cooldown      a run that begins with another run's checkpoint and lets its learning rate fall
stopping      signals that ask a run to stop
run           makes a run ready, trains it in its directory and says how it ended
launcher      one process per device
replay        trains a step that was not finite again
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
