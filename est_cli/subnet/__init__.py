"""What is sampled, when, and what it costs: pure functions on numpy, without torch.

schedule    stages: their steps, rates, and the part of the model that has joined; how layers join
strategies  which units are chosen, from random words that depend on a key only
plan        the units that one step trains, and the small model that they make; growth
sampler     (seed, step, stage) → plan
memory      parameters, bytes at a step's peak, bytes sent
flops       FLOPs of a step, and what a run has spent and saved
"""
