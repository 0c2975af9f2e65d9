"""The grid of docs/study.md: every run that it asks for, the most telling first.

A run is `experiment=study/base` with a few overrides. Runs whose record is committed are done; the others are trained
in this order, so that whenever the time ends the records tell as much as they can.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatch

from est_cli.commands.arms import ARMS, EST, FULL, FULL_SAME_FLOPS

SHORT, LONG, LONGEST = 10_000, 30_000, 60_000
"""Optimizer steps of a screen (one seed), of the headline (three), and of one comparison more (one)."""
LEARNING_RATES = ("2e-3", "4e-3", "8e-3", "16e-3")
TUNED = {EST: "4e-3", FULL: "8e-3", FULL_SAME_FLOPS: "8e-3"}
"""The best of LEARNING_RATES at SHORT steps, by arm, of those that are recorded."""
SEEDS = (0, 1, 2)
GROUPS = {
    "lr": f"learning rates: three arms, one seed, {SHORT:,} steps",
    "headline": f"headline: three arms, three seeds, {LONG:,} steps",
    "candidate": f"candidates: {LONG:,} steps",
    "longest": f"three arms, one seed, {LONGEST:,} steps",
    "screen": f"screens: one seed, {SHORT:,} steps",
    "repeated": f"a tenth of the text: one seed, up to {SHORT:,} steps",
}
"""What the runs of a group are; a run's name begins with its group."""
PAPER = "**EST, the paper's schedule**"
_UNTIL_7_15 = ("scheduler=two_stage",)


@dataclass(frozen=True)
class Run:
    """One run; `name` is also its record's file name."""

    name: str
    overrides: tuple[str, ...]
    title: str = ""
    """The name without its group, learning rate and seed."""
    says: str = ""
    """What it tries, in a table's words; its seeds and its learning rates share it."""
    lr: str = TUNED[EST]
    arm: str | None = None
    """None for a schedule that is no arm of the headline."""
    seed: int = SEEDS[0]

    @property
    def group(self) -> str:
        return self.name.partition("-")[0]


def grid() -> list[Run]:
    """All runs, the most telling first."""
    first, *later = SEEDS
    return [
        *_learning_rates(),
        *_headline(first),
        *_candidates(first),
        *_longest(),
        *_beyond_the_paper(),
        *_repeated(),
        *(run for seed in later for run in (*_headline(seed), *_candidates(seed))),
        *_ablations(),
    ]


def runs_with(**fields: object) -> list[Run]:
    """The runs of the grid whose fields have these values: `runs_with(group="headline", arm=EST)`."""
    return [run for run in grid() if all(getattr(run, name) == value for name, value in fields.items())]


def schedules_of(group: str) -> list[Run]:
    """The runs of the group that are no arm of the headline, retired ones included."""
    return [*runs_with(group=group, arm=None), *(run for run in retired() if run.group == group)]


def matching(patterns: list[str]) -> list[Run]:
    """The runs whose names match the shell patterns, in the patterns' order; all runs where there is none."""
    runs = grid()
    return list(dict.fromkeys(run for p in patterns for run in runs if fnmatch(run.name, p))) if patterns else runs


def _learning_rates() -> list[Run]:
    """Every arm over the same learning rates: its best one first, then those nearest to it."""

    def distance(pair: tuple[str, str]) -> int:
        arm, lr = pair
        return abs(LEARNING_RATES.index(lr) - LEARNING_RATES.index(TUNED[arm]))

    pairs = sorted(((arm, lr) for lr in LEARNING_RATES for arm in ARMS), key=distance)
    return [_run(f"lr-{arm}-{lr}", SHORT, lr, title=arm, says=_says(arm), arm=arm) for arm, lr in pairs]


def _headline(seed: int) -> list[Run]:
    return [_long("headline", arm, seed, TUNED[arm], says=_says(arm), arm=arm) for arm in ARMS]


def _says(arm: str) -> str:
    return PAPER if arm == EST else ""


def _longest() -> list[Run]:
    """Whether more passes over the text go on helping EST."""
    arms = (FULL_SAME_FLOPS, EST, FULL)
    return [_run(f"longest-{arm}", LONGEST, TUNED[arm], title=arm, arm=arm) for arm in arms]


def _beyond_the_paper() -> list[Run]:
    """One seed, SHORT steps: what could save more, or lose less."""
    nested = ("sampling.strategy=prefix", "optimizer.unsampled=freeze")
    longer_mild = (*_rates(0.75), *_boundaries(0.3, 0.8))
    return [
        _full(6500),
        _full(5000),
        _mild("rates-0.75", "rates 0.75", *_rates(0.75)),
        _screen("prefix", "`prefix`: nested subnetworks", "sampling.strategy=prefix"),
        _mild("grow-layers", "nested, at rest: layers alone, until 7/15", *_UNTIL_7_15, "sampling=layers", *nested),
        _mild("ramp", "`ramp`: four equal stages, rates from 0.5 to 1", "scheduler=ramp"),
        _mild("longer-0.75", "rates 0.75, boundaries 0.3 and 0.8", *longer_mild),
        _screen("shared-10", "a plan for every 10 steps", "sampling.resample_every=10"),
        _screen("longer", "boundaries 0.2 and 0.7", *_boundaries(0.2, 0.7)),
    ]


def _ablations() -> list[Run]:
    """The paper's choices, one seed, SHORT steps."""
    return [
        _mild("mlp", "neurons alone, until 7/15", *_UNTIL_7_15, "sampling=mlp"),
        _mild("layers", "layers alone, until 7/15", *_UNTIL_7_15, "sampling=layers"),
        _mild("heads", "heads alone, until 7/15", *_UNTIL_7_15, "sampling=heads"),
        _screen("heads_mlp", "heads and neurons until 7/15", *_UNTIL_7_15, "sampling=heads_mlp"),
        _screen("two-stage", "heads, neurons and layers until 7/15", *_UNTIL_7_15),
        _screen("one-stage", "heads and neurons to the end", "scheduler.stages=[{heads: 0.5, mlp: 0.5}]"),
        _screen("rates-0.25", "rates 0.25", *_rates(0.25)),
        _screen("rescaled", "kept layers rescaled", "sampling.rescale_layers=true"),
        _screen("freeze", "unsampled rows stand still", "optimizer.unsampled=freeze"),
        *(
            _screen(f"boundaries-{s1:g}-{s2:g}", f"boundaries {s1:g} and {s2:g}", *_boundaries(s1, s2))
            for s1, s2 in ((0.067, 0.233), (0.267, 0.467), (0.133, 0.7))
        ),
    ]


def _candidates(seed: int) -> list[Run]:
    """What is trained as the headline is. The first seed also tells whether a lower rate would suit the full model, and
    what saving 35% costs."""

    mild = _long("candidate", "rates-0.75", seed, TUNED[FULL], *_rates(0.75), says="rates 0.75")
    if seed != SEEDS[0]:
        return [mild]
    lower = TUNED[EST]
    return [
        *(_long("candidate", f"{arm}-{lower}", seed, lower, arm=arm) for arm in (FULL_SAME_FLOPS, FULL)),
        _long("candidate", "longer", seed, lower, *_boundaries(0.2, 0.7), says="boundaries 0.2 and 0.7"),
        mild,
    ]


def retired() -> list[Run]:
    """Recorded, and not kept: their code is in the history, at the commits that their records name."""
    stacked = ("scheduler=two_stage", "sampling=layers", "sampling.strategy=prefix", "sampling.stack_layers=true")
    says = "half of the layers until 0.45; the others begin as their copies"
    return [
        _long("candidate", "stack-0.45", 0, "8e-3", *stacked, "scheduler.stage1_end=0.45", says=says),
        *(
            _screen(name, f"`{name}` instead of random subnetworks", f"sampling.strategy={name}")
            for name in ("cyclic", "balanced")
        ),
        _screen("rewarm", "learning rate warmed again over 100 steps", "optimizer.rewarm=100"),
    ]


def _repeated() -> list[Run]:
    """A tenth of the text, read twenty times in SHORT steps: the full model learns it by heart."""
    return [
        _repeat("full", "full model, 10,000 steps", SHORT, arm=FULL),
        _repeat("est", PAPER, SHORT),
        *(_repeat(f"full-{steps}", f"full model, {steps:,} steps", steps, arm=FULL) for steps in (6500, 4000)),
    ]


def _repeat(title: str, says: str, steps: int, arm: str | None = None) -> Run:
    lr = TUNED[arm or EST]
    return _run(f"repeated-{title}-{lr}", steps, lr, "data.train_tokens=500000", title=title, says=says, arm=arm)


def _rates(rate: float) -> tuple[str, ...]:
    return tuple(f"sampling.{unit}={rate}" for unit in ("heads", "mlp", "layers"))


def _boundaries(stage1_end: float, stage2_end: float) -> tuple[str, ...]:
    return f"scheduler.stage1_end={stage1_end}", f"scheduler.stage2_end={stage2_end}"


def _full(steps: int) -> Run:
    """The full model for fewer steps, with a learning-rate schedule of its own."""
    title, says = f"full-{steps}", f"full model, {steps:,} steps"
    return _run(f"screen-{title}", steps, TUNED[FULL], title=title, says=says, arm=FULL)


def _screen(title: str, says: str, *overrides: str, lr: str = TUNED[EST]) -> Run:
    return _run(f"screen-{title}-{lr}", SHORT, lr, *overrides, title=title, says=says)


def _mild(title: str, says: str, *overrides: str) -> Run:
    """A screen whose subnetworks are nearer to the full model than the paper's: it gets the full model's rate."""
    return _screen(title, says, *overrides, lr=TUNED[FULL])


def _long(group: str, title: str, seed: int, lr: str, *overrides: str, says: str = "", arm: str | None = None) -> Run:
    run = _run(f"{group}-{title}-seed{seed}", LONG, lr, *overrides, title=title, says=says, arm=arm)
    return replace(run, overrides=(*run.overrides, f"seed={seed}"), seed=seed)


def _run(name: str, steps: int, lr: str, *overrides: str, title: str, says: str = "", arm: str | None = None) -> Run:
    size = (f"trainer.max_steps={steps}", f"optimizer.lr={lr}")
    return Run(name, (*size, *overrides, *([f"+arm={arm}"] if arm else [])), title, says, lr, arm)
