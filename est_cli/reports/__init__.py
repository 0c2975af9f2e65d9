"""Reports on runs, from their folders only: no torch, no wandb.

records           a run read from its folder
comparison        what differs between runs; runs that differ only in their seed, as arms; times of stages
curves            columns against steps, tokens, FLOPs or time, ready for drawing
coverage          how often each unit was trained, recomputed from the config
style             the look of all figures
figures           the figures of a report
page              the HTML page; page.html is its template
report            writes page, figures and tables into a folder
terminal          the report for a terminal
analysis_figures  the figures of est-analyze
trace_plot        a figure of profiler traces

Only style, figures, page, analysis_figures and trace_plot need matplotlib.
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
