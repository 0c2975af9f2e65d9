"""What a run tells people and machines: metrics.jsonl, Weights & Biases, the terminal, the summary."""
