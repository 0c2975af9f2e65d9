"""Step timing: the stages of a schedule, and a peer, interleaved in one process. torch and numpy alone."""
