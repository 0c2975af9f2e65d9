"""Many runs: a sweep, and the comparison of ways to train.

arms          composed config → the config of a run or of one arm of a comparison
naming        what a sweep's overrides ask for, and the folder names made from them
arm_jobs      which jobs compare the arms fairly, and in which order they run
sweep         runs jobs, one folder each
result        one table and report of a sweep's jobs
saving        an arm beside the full model: its loss, and what it saves at equal loss
verdict       what the runs of a comparison say
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
