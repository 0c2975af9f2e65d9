"""The packed subnetwork, its optimizer, checkpoints, processes, and the loop."""
