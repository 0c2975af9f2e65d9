"""What is sampled, when, and what it costs: pure functions on numpy, without torch."""
