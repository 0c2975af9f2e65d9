"""Reports on runs, from their folders only: no torch, no wandb.

records reads runs, comparison and curves prepare them, coverage recomputes what was trained. report writes the files
(figures in style, page by its template), terminal prints. analysis_figures and trace_plot draw for est-analyze and
for traces. Import the modules themselves: only figures, style, page and trace_plot need matplotlib.
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
