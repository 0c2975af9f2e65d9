"""The study of docs/study.md: its grid of runs, what trains them, and what its tables and figures are made of."""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
