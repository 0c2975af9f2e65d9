"""Step timing: the stages of a schedule, and a peer, interleaved in one process. torch and numpy alone."""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
