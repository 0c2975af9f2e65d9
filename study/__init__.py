"""The study of docs/study.md: its grid of runs, what trains them, and what its tables and figures are made of."""
