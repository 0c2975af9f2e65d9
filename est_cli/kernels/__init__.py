"""The three memory-bound places of a step: packing, AdamW on sampled rows, linear cross-entropy."""
