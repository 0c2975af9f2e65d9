"""The grid of docs/study.md: every run that it asks for, the most telling first.

A run is `experiment=study/base` with a few overrides. Runs whose record is committed are done; the others are trained
in this order, so that whenever the time ends the records tell as much as they can.
"""

from dataclasses import dataclass
from fnmatch import fnmatch

SMALL, LARGE = "small", "large"
SIZES = {
    SMALL: (8, 64, 2100),
    LARGE: (12, 64, 3100),
}
"""Layers, width, and the optimizer steps of 2,048 tokens that make 10 tokens a parameter."""
SHORT = 100
"""Optimizer steps of warmup in conf/experiment/study/base.yaml, with which the screens ran."""
WARMUP = {SMALL: 400, LARGE: 600}
"""Optimizer steps of warmup at the size's own length that the headline has. Shorter and longer runs scale them, except
the shorter full model, which is better with SHORT."""
LEARNING_RATES = ("1e-3", "2e-3", "4e-3", "8e-3", "16e-3")
SEEDS = (0, 1, 2, 3, 4)
FULL, WINNER, LATEST = "full", "doubling", "stack-2-4-latest"
"""LATEST spends least of what was screened, and is tried where there is more text."""
EARLY = "doubling-0.25-0.5-for-0.75"
"""Grows earlier and trains for fewer steps: about as many FLOPs as WINNER."""
LARGE_SCREENS = ("doubling-0.6-0.8", "doubling-0.4-0.7-for-0.8")
TUNED = (
    (FULL, SMALL, "4e-3", 400),
    (FULL, SMALL, "4e-3", 800),
    (FULL, SMALL, "8e-3", 400),
    (f"{FULL}-0.5", SMALL, "4e-3", 400),
    (WINNER, SMALL, "8e-3", 400),
    (WINNER, SMALL, "8e-3", 800),
    (WINNER, SMALL, "4e-3", 400),
    (WINNER, SMALL, "16e-3", 400),
    (FULL, LARGE, "2e-3", 600),
    (FULL, LARGE, "4e-3", 600),
    (WINNER, LARGE, "8e-3", 600),
)
"""Arm, size, learning rate and warmup of the runs that tuned the two together."""
SHORTER = (0.5,)
"""The full model for fewer steps, with a decay of its own: what every schedule is held against at equal FLOPs."""
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
    lr: str
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


def _full(length: float = 1.0) -> Arm:
    name, says = (FULL, "full model") if length == 1 else (f"{FULL}-{length:g}", f"full model, {length:g} of the steps")
    return Arm(name, says, ("scheduler=full",), "4e-3", length, large_lr="2e-3")


def _baseline(name: str, says: str, *overrides: str) -> Arm:
    return Arm(f"{FULL}-{name}", f"full model, {says}", ("scheduler=full", *overrides), "4e-3")


def _stack(depth: int, at: float, lr: str = "8e-3", **options: str) -> Arm:
    name = "-".join([f"stack-{depth}-at-{at:g}", *options.values()])
    says = ", ".join([f"{depth} layer{'s' if depth > 1 else ''} until {at:g}", *options.values()])
    chosen = tuple(f"scheduler.{key}={value}" for key, value in options.items())
    return Arm(
        name, says, ("scheduler=stacking", f"scheduler.depths={depth}", f"scheduler.grow_at={at:g}", *chosen), lr
    )


def _stacks(name: str, depths: tuple[int, ...], ends: tuple[float, ...]) -> Arm:
    """Several growths."""
    says = ", ".join(
        f"{depth} layer{'s' if depth > 1 else ''} until {end:g}" for depth, end in zip(depths, ends, strict=True)
    )
    lists = (f"scheduler.depths={list(depths)}", f"scheduler.grow_at={list(ends)}")
    return Arm(name, says, ("scheduler=stacking", *(text.replace(" ", "") for text in lists)), "8e-3")


def _doubling(ends: tuple[float, float], length: float = 1.0) -> Arm:
    """A quarter of the layers, then half, then all."""
    at = "-".join(f"{end:g}" for end in ends)
    name = f"{WINNER}-{at}" if length == 1 else f"{WINNER}-{at}-for-{length:g}"
    says = f"a quarter of the layers until {ends[0]:g}, half until {ends[1]:g}"
    steps = f", {length:g} of the steps" if length != 1 else ""
    grow_at = f"scheduler.grow_at=[{ends[0]:g},{ends[1]:g}]"
    return Arm(name, says + steps, (f"scheduler={WINNER}", grow_at), "8e-3", length)


def _schedule(name: str, says: str, *overrides: str, lr: str = "4e-3") -> Arm:
    return Arm(name, says, overrides, lr)


ARMS = {
    arm.name: arm
    for arm in (
        _full(),
        *map(_full, SHORTER),
        _baseline("decay-0.03", "weight decay 0.03", "optimizer.weight_decay=0.03"),
        _baseline("decay-0.3", "weight decay 0.3", "optimizer.weight_decay=0.3"),
        _baseline("init", "GPT-2's initialisation", "model.init=gpt2"),
        _schedule("doubling", "a quarter of the layers until 0.4, half until 0.7", "scheduler=doubling", lr="8e-3"),
        _stack(2, 0.5),
        _stack(1, 0.5, "4e-3"),
        _stack(4, 0.5),
        _stack(2, 0.3),
        _stack(2, 0.7),
        _stack(2, 0.8),
        _stack(2, 0.5, grow="interleave"),
        _stack(2, 0.5, grow="random"),
        _stack(2, 0.5, grow="zero"),
        _stack(2, 0.5, grow_moments="reset"),
        _stacks("stack-2-4", (2, 4), (0.4, 0.7)),
        _stacks("stack-2-4-later", (2, 4), (0.5, 0.8)),
        _stacks("stack-2-4-latest", (2, 4), (0.6, 0.85)),
        _stacks("stack-1-2-4", (1, 2, 4), (0.15, 0.45, 0.75)),
        _doubling((0.6, 0.8)),
        _doubling((0.4, 0.7), 0.8),
        _doubling((0.25, 0.5), 0.75),
        _doubling((0.25, 0.5), 0.6),
        _schedule("raptr", "RAPTR", "scheduler=raptr"),
        _schedule("layer_drop", "layer dropping by depth", "scheduler=layer_drop"),
        _schedule("est", "EST, the paper's schedule", "scheduler=three_stage"),
    )
}


def is_baseline(arm: Arm) -> bool:
    """Whether it is the full model with one setting changed."""
    return arm.is_full and arm.name not in (FULL, *(f"{FULL}-{length:g}" for length in SHORTER))


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


def run_of(
    group: str,
    arm: Arm,
    size: str = SMALL,
    lr: str | None = None,
    seed: int = 0,
    length: float = 1.0,
    warmup: int = SHORT,
) -> Run:
    """`length` is in the size's own steps, 10 tokens a parameter."""
    lr, steps = lr or arm.lr_at(size, warmup), round(SIZES[size][2] * length * arm.length)
    tags = [*([f"x{length:g}"] if length != 1 else []), *([f"w{warmup}"] if warmup != SHORT else [])]
    return Run("-".join([size, arm.name, lr, *tags, f"seed{seed}"]), group, arm, size, lr, steps, seed, warmup)


def grid() -> list[Run]:
    """All runs, the most telling first."""
    shorter = [f"{FULL}-{length:g}" for length in SHORTER]

    def seeds(size: str, *numbers: int) -> list[Run]:
        names = (FULL, WINNER, EARLY) if size == SMALL else (FULL, WINNER)
        arms = [(ARMS[name], WARMUP[size]) for name in names] + [(ARMS[name], SHORT) for name in shorter]
        return [run_of("headline", arm, size, seed=seed, warmup=warmup) for seed in numbers for arm, warmup in arms]

    def short(size: str, *numbers: int) -> list[Run]:
        return [run_of("short", ARMS[name], size, seed=seed) for seed in numbers for name in (FULL, WINNER)]

    # Rates around the best one: the full model wants a lower rate than what grows.
    rates = [run_of("lr", ARMS[FULL], lr=lr) for lr in LEARNING_RATES[1:4]]
    rates += [run_of("lr", ARMS[name], lr=lr) for name in (WINNER, "stack-2-at-0.5") for lr in LEARNING_RATES[2:]]
    rates.append(run_of("lr", ARMS["stack-1-at-0.5"], lr="8e-3"))
    rates += [run_of("lr", ARMS[FULL], LARGE, lr=lr) for lr in LEARNING_RATES[:3]]
    rates += [run_of("lr", ARMS[f"{FULL}-{SHORTER[0]:g}"], LARGE, lr=lr) for lr in LEARNING_RATES[1:3]]
    rates += [run_of("lr", ARMS[WINNER], LARGE, lr=lr) for lr in LEARNING_RATES[2:4]]
    warmups = [run_of("lr", ARMS[name], size, lr, warmup=warmup) for name, size, lr, warmup in TUNED]
    first, second, *later = SEEDS
    start = [*seeds(SMALL, first), *seeds(LARGE, first)]
    return [
        *start,
        *(run for run in warmups if run.name not in {headline.name for headline in start}),
        *seeds(SMALL, second, *later),
        *seeds(LARGE, second, *later),
        *(run_of("baseline", arm, warmup=WARMUP[SMALL]) for arm in ARMS.values() if is_baseline(arm)),
        *short(SMALL, first),
        *(run for run in rates if run.lr != run.arm.lr_at(run.size)),
        *(run_of("screen", arm) for name, arm in ARMS.items() if not arm.is_full and WINNER not in name),
        *(run_of("screen", arm, LARGE) for name, arm in ARMS.items() if name in LARGE_SCREENS),
        run_of("screen", ARMS["doubling-0.25-0.5-for-0.6"], LARGE, warmup=WARMUP[LARGE]),
        # The full model at its ordinary length is the full model for half of the steps here.
        *(run_of("length", ARMS[name], length=2.0) for name in (FULL, WINNER, LATEST)),
        run_of("length-lr", ARMS[FULL], lr="2e-3", length=2.0),
        *(run_of("length", ARMS[name], length=2.0, seed=second) for name in (FULL, WINNER)),
        *(run_of("length", ARMS[name], length=0.5) for name in (FULL, WINNER)),
        *short(SMALL, second, *later),
        *short(LARGE, *SEEDS),
    ]


def runs_with(**fields: object) -> list[Run]:
    """The runs of the grid whose fields have these values: `runs_with(group="headline", size=SMALL)`."""
    return [run for run in grid() if all(getattr(run, name) == value for name, value in fields.items())]


def matching(patterns: list[str]) -> list[Run]:
    """The runs whose names match the shell patterns, in the patterns' order; all runs where there is none."""
    runs = grid()
    return list(dict.fromkeys(run for p in patterns for run in runs if fnmatch(run.name, p))) if patterns else runs
