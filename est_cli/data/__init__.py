"""Text → token files → batches. Imports no torch."""
