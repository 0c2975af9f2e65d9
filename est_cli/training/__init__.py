"""The packed subnetwork, its optimizer, checkpoints, processes, and the loop."""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
