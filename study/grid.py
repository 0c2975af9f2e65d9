"""The grid of docs/study.md: every run that it asks for, the most telling first.

A run is `experiment=study/base` with a few overrides. Runs whose record is committed are done; the others are trained
in this order, so that whenever the time ends the records tell as much as they can.
"""

from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache

SMALL, LARGE = "small", "large"
SIZES = {
    SMALL: (8, 64, 2100),
    LARGE: (12, 64, 3100),
}
"""Layers, width, and the optimizer steps of 2,048 tokens that make 10 tokens a parameter."""
SHORT = 100
"""Optimizer steps of warmup in conf/experiment/study/base.yaml, with which the screens ran."""
WARMUP = {SMALL: 400, LARGE: 600}
"""Optimizer steps of warmup of the headline at the size's own length. Shorter and longer runs scale them, except the
shorter full model, which is better with SHORT."""
LEARNING_RATES = ("1e-3", "2e-3", "4e-3", "8e-3", "16e-3")
SEEDS = (0, 1, 2, 3, 4)
SHORTER = 0.5
"""Share of the steps of SHORTER_FULL, whose decay is its own: it shows what the full model reaches with fewer FLOPs."""
FULL, SHORTER_FULL, WINNER = "full", "full-0.5", "doubling"
GROUPS = {
    "lr": "learning rates and warmup: one seed",
    "headline": "headline: the full model and the best schedule, paired seeds",
    "short": f"the same with {SHORT} steps of warmup",
    "length": "fewer and more tokens a parameter",
    "length-lr": "the full model's learning rate at 20 tokens a parameter",
    "screen": "screens: one seed",
    "baseline": "what else may hold the full model back: one seed",
}
"""What the runs of a group are for."""


@dataclass(frozen=True)
class Arm:
    """A way to train."""

    name: str
    says: str
    """In a table's words."""
    overrides: tuple[str, ...]
    lr: str = "4e-3"
    """The best of the learning rates that were tried, at SMALL and its full length."""
    length: float = 1.0
    """Steps, as a share of the size's."""
    large_lr: str = ""
    """The best at LARGE with SHORT warmup, if it is another one."""

    @property
    def is_full(self) -> bool:
        """Whether it trains the full model throughout, for as long as the others or for less."""
        return self.name.startswith(FULL)

    def lr_at(self, size: str, warmup: int = SHORT) -> str:
        """The best of the learning rates that were tried at the size with this warmup."""
        return self.large_lr if size == LARGE and warmup == SHORT and self.large_lr else self.lr


def _stack(name: str, says: str, depths: str, grow_at: str, *overrides: str, lr: str = "8e-3") -> Arm:
    stages = (f"scheduler.depths={depths}", f"scheduler.grow_at={grow_at}")
    return Arm(name, says, ("scheduler=stacking", *stages, *overrides), lr)


def _doubling(first: float, second: float, length: float = 1.0) -> Arm:
    says, name = f"a quarter of the layers until {first:g}, half until {second:g}", f"{WINNER}-{first:g}-{second:g}"
    if length != 1:
        says, name = f"{says}, {length:g} of the steps", f"{name}-for-{length:g}"
    return Arm(name, says, ("scheduler=doubling", f"scheduler.grow_at=[{first:g},{second:g}]"), "8e-3", length)


ARMS = {
    arm.name: arm
    for arm in (
        Arm(FULL, "full model", ("scheduler=full",), large_lr="2e-3"),
        Arm(SHORTER_FULL, "full model, 0.5 of the steps", ("scheduler=full",), length=SHORTER, large_lr="2e-3"),
        Arm("full-decay-0.03", "full model, weight decay 0.03", ("scheduler=full", "optimizer.weight_decay=0.03")),
        Arm("full-decay-0.3", "full model, weight decay 0.3", ("scheduler=full", "optimizer.weight_decay=0.3")),
        Arm("full-init", "full model, GPT-2's initialisation", ("scheduler=full", "model.init=gpt2")),
        Arm(WINNER, "a quarter of the layers until 0.4, half until 0.7", ("scheduler=doubling",), lr="8e-3"),
        _stack("stack-2-at-0.5", "2 layers until 0.5", "2", "0.5"),
        _stack("stack-1-at-0.5", "1 layer until 0.5", "1", "0.5", lr="4e-3"),
        _stack("stack-4-at-0.5", "4 layers until 0.5", "4", "0.5"),
        _stack("stack-2-at-0.3", "2 layers until 0.3", "2", "0.3"),
        _stack("stack-2-at-0.7", "2 layers until 0.7", "2", "0.7"),
        _stack("stack-2-at-0.8", "2 layers until 0.8", "2", "0.8"),
        *(
            _stack(f"stack-2-at-0.5-{value}", f"2 layers until 0.5, {value}", "2", "0.5", f"scheduler.{key}={value}")
            for key, value in (("grow", "interleave"), ("grow", "random"), ("grow", "zero"), ("grow_moments", "reset"))
        ),
        _stack("stack-2-4", "2 layers until 0.4, 4 layers until 0.7", "[2,4]", "[0.4,0.7]"),
        _stack("stack-2-4-later", "2 layers until 0.5, 4 layers until 0.8", "[2,4]", "[0.5,0.8]"),
        _stack("stack-2-4-latest", "2 layers until 0.6, 4 layers until 0.85", "[2,4]", "[0.6,0.85]"),
        _stack(
            "stack-1-2-4", "1 layer until 0.15, 2 layers until 0.45, 4 layers until 0.75", "[1,2,4]", "[0.15,0.45,0.75]"
        ),
        _doubling(0.6, 0.8),
        _doubling(0.4, 0.7, 0.8),
        _doubling(0.25, 0.5, 0.75),
        _doubling(0.25, 0.5, 0.6),
        Arm("raptr", "RAPTR", ("scheduler=raptr",)),
        Arm("layer_drop", "layer dropping by depth", ("scheduler=layer_drop",)),
        Arm("est", "EST, the paper's schedule", ("scheduler=three_stage",)),
    )
}


@dataclass(frozen=True)
class Run:
    """One run; `name` is also its record's file name."""

    name: str
    group: str
    arm: Arm
    size: str
    lr: str
    steps: int
    seed: int
    warmup: int = SHORT
    """In optimizer steps at the size's own length; SHORT is SHORT at any length."""

    @property
    def overrides(self) -> tuple[str, ...]:
        layers, width, _ = SIZES[self.size]
        model = (f"model.n_layers={layers}", f"model.d_model={width}")
        size = (f"trainer.max_steps={self.steps}", f"optimizer.lr={self.lr}", f"seed={self.seed}")
        scaled = round(self.warmup * self.steps / SIZES[self.size][2])
        warmup = (f"optimizer.warmup={scaled}",) if self.warmup != SHORT else ()
        return (*model, *size, *self.arm.overrides, *warmup, f"name={self.arm.name}")

    @property
    def held_against(self) -> "list[Run]":
        """The full model of this size and seed: for the same tokens, then for fewer. Empty if the grid lacks it."""
        tuned = runs_with(size=self.size, seed=self.seed)
        tuned = [run for run in tuned if run.arm.is_full and run.group in ("headline", "short", "length")]
        found = []
        for length in (1.0, SHORTER):
            steps = round(self.steps / self.arm.length * length)
            fitting = [r for r in tuned if r.steps == steps and (r.warmup == self.warmup or r.arm.length < 1)]
            if not fitting:
                break
            found.append(min(fitting, key=lambda run: abs(run.arm.length - length)))
        return found


def run_of(
    group: str,
    name: str,
    size: str = SMALL,
    lr: str | None = None,
    seed: int = 0,
    length: float = 1.0,
    warmup: int = SHORT,
) -> Run:
    """A run of the named arm. `length` is in the size's own steps, 10 tokens a parameter."""
    arm = ARMS[name]
    lr, steps = lr or arm.lr_at(size, warmup), round(SIZES[size][2] * length * arm.length)
    tags = [*([f"x{length:g}"] if length != 1 else []), *([f"w{warmup}"] if warmup != SHORT else [])]
    return Run("-".join([size, name, lr, *tags, f"seed{seed}"]), group, arm, size, lr, steps, seed, warmup)


def _headline(size: str, *seeds: int) -> list[Run]:
    # The last one grows earlier and trains for fewer steps: about as many FLOPs as WINNER.
    names = (FULL, WINNER, "doubling-0.25-0.5-for-0.75") if size == SMALL else (FULL, WINNER)
    arms = {**dict.fromkeys(names, WARMUP[size]), SHORTER_FULL: SHORT}
    return [run_of("headline", name, size, seed=n, warmup=warmup) for n in seeds for name, warmup in arms.items()]


def _short(size: str, *seeds: int) -> list[Run]:
    return [run_of("short", name, size, seed=seed) for seed in seeds for name in (FULL, WINNER)]


@cache
def grid() -> tuple[Run, ...]:
    """All runs, the most telling first."""
    first, second, *later = SEEDS
    # Learning rates and warmup were tuned together.
    tuned = [
        *(run_of("lr", FULL, lr=lr, warmup=warmup) for lr, warmup in (("4e-3", 400), ("4e-3", 800), ("8e-3", 400))),
        run_of("lr", SHORTER_FULL, lr="4e-3", warmup=400),
        *(run_of("lr", WINNER, lr="8e-3", warmup=warmup) for warmup in (400, 800)),
        *(run_of("lr", WINNER, lr=lr, warmup=400) for lr in ("4e-3", "16e-3")),
        *(run_of("lr", FULL, LARGE, lr, warmup=600) for lr in ("2e-3", "4e-3")),
        run_of("lr", WINNER, LARGE, "8e-3", warmup=600),
    ]
    # Rates around the best one: the full model wants a lower rate than what grows.
    rates = [
        *(run_of("lr", FULL, lr=lr) for lr in LEARNING_RATES[1:4]),
        *(run_of("lr", name, lr=lr) for name in (WINNER, "stack-2-at-0.5") for lr in LEARNING_RATES[2:]),
        run_of("lr", "stack-1-at-0.5", lr="8e-3"),
        *(run_of("lr", FULL, LARGE, lr=lr) for lr in LEARNING_RATES[:3]),
        *(run_of("lr", SHORTER_FULL, LARGE, lr=lr) for lr in LEARNING_RATES[1:3]),
        *(run_of("lr", WINNER, LARGE, lr=lr) for lr in LEARNING_RATES[2:4]),
    ]
    start = [*_headline(SMALL, first), *_headline(LARGE, first)]
    return (
        *start,
        *(run for run in tuned if run.name not in {headline.name for headline in start}),
        *_headline(SMALL, second, *later),
        *_headline(LARGE, second, *later),
        *(
            run_of("baseline", name, warmup=WARMUP[SMALL])
            for name in ("full-decay-0.03", "full-decay-0.3", "full-init")
        ),
        *_short(SMALL, first),
        *(run for run in rates if run.lr != run.arm.lr_at(run.size)),
        *(run_of("screen", name) for name, arm in ARMS.items() if not arm.is_full and WINNER not in name),
        *(run_of("screen", name, LARGE) for name in ("doubling-0.6-0.8", "doubling-0.4-0.7-for-0.8")),
        run_of("screen", "doubling-0.25-0.5-for-0.6", LARGE, warmup=WARMUP[LARGE]),
        # The full model at its ordinary length is the full model for half of the steps here. The last schedule spends
        # least of what was screened.
        *(run_of("length", name, length=2.0) for name in (FULL, WINNER, "stack-2-4-latest")),
        run_of("length-lr", FULL, lr="2e-3", length=2.0),
        *(run_of("length", name, length=2.0, seed=second) for name in (FULL, WINNER)),
        *(run_of("length", name, length=0.5) for name in (FULL, WINNER)),
        *_short(SMALL, second, *later),
        *_short(LARGE, *SEEDS),
    )


def runs_with(**fields: object) -> list[Run]:
    """The runs of the grid whose fields have these values: `runs_with(group="headline", size=SMALL)`."""
    return [run for run in grid() if all(getattr(run, name) == value for name, value in fields.items())]


def matching(patterns: list[str]) -> list[Run]:
    """The runs whose names match the shell patterns, in the patterns' order; all runs where there is none."""
    return list(dict.fromkeys(run for p in patterns or ["*"] for run in grid() if fnmatch(run.name, p)))
