"""Evolving Subnetwork Training: pre-train transformers for less compute (arXiv 2406.06962)."""

__version__ = "0.1.0"
