"""What a trained run is worth: loss, generation, analysis, export."""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
