"""What a trained run is worth: loss, generation, analysis, export."""
