"""The tables and sentences of docs/study.md, from the records alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from est_cli.commands.arms import ARMS, EST, FULL, FULL_SAME_FLOPS
from est_cli.commands.verdict import Verdict, against
from est_cli.reports.records import RunRecord
from est_cli.units import format_flops, format_percent
from study import budget
from study.frontier import Frontier
from study.grid import GROUPS, LEARNING_RATES, LONG, LONGEST, SEEDS, SHORT, TUNED, Run, runs_with, schedules_of
from study.records import Records

MISSING = "not yet run"
_GOAL = 0.35
"""Of the whole model's FLOPs, to be saved without loss."""


def budget_table(records: Records) -> str:
    rows, total = [], 0.0
    for group, what in GROUPS.items():
        runs = runs_with(group=group)
        missing = [run for run in runs if run not in records]
        minutes = sum(map(budget.minutes, missing))
        total += minutes
        rows.append((what, len(runs), len(runs) - len(missing), f"{minutes:.0f}"))
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2)), f"{total:.0f}"))
    return _table(("runs", "asked for", "done", "core-minutes to go"), rows)


def learning_rates(records: Records) -> str:
    """Loss of every arm at every learning rate; the best of an arm is bold."""
    rows = []
    for arm in ARMS:
        losses = losses_by_rate(records, arm).values()
        best = min((loss for loss in losses if loss is not None), default=None)
        rows.append((ARM_WORDS[arm], *(MISSING if x is None else _bold(f"{x:.4f}", x == best) for x in losses)))
    table = _table(("arm", *(f"{float(lr):g}" for lr in LEARNING_RATES)), rows)
    return table + _figure("learning-rates", "Final loss of the three arms over the learning rate", records, "lr-")


def losses_by_rate(records: Records, arm: str) -> dict[str, float | None]:
    """Final loss of the arm at SHORT steps, by learning rate; None where it is not known."""
    return {lr: _loss(records, group="lr", arm=arm, lr=lr) for lr in LEARNING_RATES}


def tuned_at_an_edge(records: Records) -> str:
    """Which arms' best learning rate may lie outside of the grid, or is not known yet."""
    open_arms = []
    for arm in ARMS:
        known = losses_by_rate(records, arm)
        if None in known.values() or min(known, key=known.get) in (LEARNING_RATES[0], LEARNING_RATES[-1]):
            open_arms.append(ARM_WORDS[arm])
    if not open_arms:
        return "Every arm's best rate lies inside the grid."
    return f"Not settled, because rates are missing or the best one lies at an edge: {'; '.join(open_arms)}."


def headline(records: Records) -> str:
    table = _arms_table(records, runs_with(group="headline"))
    return table + _figure("headline", "Loss of the three arms against training compute", records, "headline-")


def headline_says(records: Records) -> str:
    return _sentences(records, runs_with(group="headline"))


def candidates(records: Records) -> str:
    """What was trained as long as the headline, against the full model of the same seed; ± deviation over seeds."""
    rows = []
    for says, done in _long_runs(records).items():
        seeds = f"{len(done.losses)} of {done.asked}"
        if not done.losses:
            rows.append((says, seeds, MISSING, *[""] * 5))
            continue
        rows.append(
            (
                says,
                seeds,
                done.saved,
                _over_seeds(done.losses, "{:.4f}"),
                _over_seeds([f.loss[-1] if len(f.loss) else math.nan for f in done.frontiers], "{:.4f}"),
                _over_seeds(done.same_flops, "{:.4f}"),
                _over_seeds(done.against_same_flops, "{:+.4f}"),
                _percent(done.saved_at_equal_loss),
            )
        )
    header = (
        "schedule",
        "seeds",
        "saved",
        "loss",
        "full, same tokens",
        "full, same FLOPs",
        "difference",
        "saved at equal loss",
    )
    return _table(header, rows) + _figure(
        "candidates", "Loss against training compute", records, "headline-", "candidate-"
    )


def best_says(records: Records) -> str:
    """The schedule that all seeds are there of, and that is furthest below the full model for the same FLOPs."""
    whole = [
        (float(np.mean(done.against_same_flops)), says, done)
        for says, done in _long_runs(records).items()
        if len(done.losses) == len(SEEDS) and len(done.frontier.loss)
    ]
    if not whole:
        return f"Nothing to say: the long runs are {MISSING}."
    _, says, best = min(whole, key=lambda entry: entry[0])
    same_tokens = np.subtract(best.losses, [frontier.loss[-1] for frontier in best.frontiers])
    return (
        f"The best over {len(SEEDS)} seeds: {says}. Loss less that of the full model for the same FLOPs: "
        f"{_over_seeds(best.against_same_flops, '{:+.4f}')}; for the same tokens, at {best.saved} fewer FLOPs: "
        f"{_over_seeds(same_tokens, '{:+.4f}')}. Saved at equal loss: {_percent(best.saved_at_equal_loss)}."
    )


def goal_says(records: Records) -> str:
    """How close the schedules that were trained as long as the headline came to the goal."""
    said, best = [], (-math.inf, "")
    for says, done in _long_runs(records).items():
        if not len(done.frontier.loss):
            continue
        seeds = f"{says} ({len(done.losses)} seed{'s' if len(done.losses) > 1 else ''})"
        if done.share_saved >= _GOAL - 5e-4:
            loss = _difference(float(np.mean(done.losses)) - done.frontier.loss[-1])
            said.append(f"{seeds}: {done.saved} saved, loss {loss} the full model's for the same tokens")
        if done.saved_at_equal_loss > best[0]:
            best = (done.saved_at_equal_loss, seeds)
    said += [f"the most that was saved at equal loss is {_percent(best[0])}, by {best[1]}"] if best[1] else []
    return f"{'; '.join(said)}." if said else f"Nothing to say: the long runs are {MISSING}."


@dataclass(frozen=True)
class _LongRuns:
    """The seeds of one schedule that are done, each beside the full model of its own seed."""

    asked: int
    """Seeds, the missing ones included."""
    losses: list[float]
    flops: list[float]
    frontiers: list[Frontier]

    @classmethod
    def of(cls, records: Records, runs: list[Run]) -> "_LongRuns":
        done = [run for run in runs if run in records]
        outcomes = [record.outcome for record in records.of(done)]
        frontiers = [long_frontier(records, run.seed) for run in done]
        return cls(len(runs), [o["val_loss"] for o in outcomes], [o["flops_total"] for o in outcomes], frontiers)

    @property
    def frontier(self) -> Frontier:
        """The mean over the seeds."""
        return Frontier.mean(self.frontiers)

    @property
    def same_flops(self) -> list[float]:
        """Losses of the full model for the FLOPs of each seed."""
        return [frontier.loss_at(spent) for frontier, spent in zip(self.frontiers, self.flops, strict=True)]

    @property
    def against_same_flops(self) -> list[float]:
        return [loss - full for loss, full in zip(self.losses, self.same_flops, strict=True)]

    @property
    def share_saved(self) -> float:
        """Of the FLOPs of the full model's whole run."""
        return 1 - float(np.mean(self.flops)) / self.frontier.flops[-1] if len(self.frontier.flops) else math.nan

    @property
    def saved(self) -> str:
        return _percent(self.share_saved)

    @property
    def saved_at_equal_loss(self) -> float:
        """Of the FLOPs that the full model needs for the mean loss; NaN where that was not measured."""
        return 1 - float(np.mean(self.flops)) / self.frontier.flops_at(float(np.mean(self.losses)))


def long_frontier(records: Records, seed: int) -> Frontier:
    """The full model of one seed for both lengths of the headline, each at the better of its learning rates.

    Empty where either is missing.
    """
    best = []
    for arm in (FULL, FULL_SAME_FLOPS):
        asked = [*runs_with(group="headline", arm=arm, seed=seed), *runs_with(group="candidate", arm=arm, seed=seed)]
        runs = records.of(asked)
        best += sorted(runs, key=lambda run: run.outcome["val_loss"])[:1]
    return Frontier.of(best if len(best) == 2 else [])


def lengths(records: Records) -> str:
    """The three arms of the first seed after more and more steps."""
    rows = []
    for group, steps in (("lr", SHORT), ("headline", LONG), ("longest", LONGEST)):
        losses = {arm: _tuned_loss(records, group, arm) for arm in ARMS}
        shown = [MISSING if loss is None else f"{loss:.4f}" for loss in losses.values()]
        differences = [
            "-" if None in (losses[EST], losses[arm]) else _signed(losses[EST] - losses[arm])
            for arm in (FULL, FULL_SAME_FLOPS)
        ]
        rows.append((f"{steps:,}", *shown, *differences))
    header = ("steps", *(ARM_WORDS[arm] for arm in ARMS), "EST less same tokens", "EST less same FLOPs")
    return _table(header, rows)


def second_rate_says(records: Records) -> str:
    """What the full model would have reached at EST's learning rate: how a baseline that is not tuned misleads."""
    est = _tuned_loss(records, "headline", EST)
    said = []
    for arm in (FULL, FULL_SAME_FLOPS):
        tuned = _tuned_loss(records, "headline", arm)
        second = _loss(records, group="candidate", arm=arm, lr=TUNED[EST], seed=SEEDS[0])
        if None not in (est, tuned, second):
            rates = f"{second:.4f} at {float(TUNED[EST]):g}, {tuned:.4f} at {float(TUNED[arm]):g}"
            differences = f"{_difference(est - second)} the former and {_difference(est - tuned)} the latter"
            said.append(f"{ARM_WORDS[arm]}: {rates}; EST's loss is {differences}")
    return f"Seed {SEEDS[0]}. {'. '.join(said)}." if said else f"The full model at EST's learning rate: {MISSING}."


def short_arms(records: Records) -> str:
    table = _arms_table(records, tuned_runs())
    return table + _figure("short-runs", "Loss of the three arms against training compute", records, "lr-")


def short_arms_say(records: Records) -> str:
    return _sentences(records, tuned_runs())


def screens(records: Records) -> str:
    """Every schedule against what the full model reaches for the same FLOPs, the best first."""
    frontier, found = short_frontier(records), screened(records)
    rows = [
        (
            run.says,
            f"{record.setting('optimizer.lr'):g}",
            _saved(frontier, record),
            f"{record.outcome['val_loss']:.4f}",
            _number(frontier.loss_at(record.outcome["flops_total"])),
            _signed(difference),
            _saved_at_equal_loss(frontier, record),
        )
        for difference, run, record in found
    ]
    header = ("schedule", "lr", "saved", "loss", "full, same FLOPs", "difference", "saved at equal loss")
    text = _table(header, rows)
    if found:
        text += _figure("screens", "Final loss of every schedule against the compute it spent", records, "")
    shown = {run.says for _, run, _ in found}
    missing = [says for says in _schedules() if says not in shown]
    return f"{text}\n\nNot yet run: {'; '.join(missing)}." if missing else text


def screened(records: Records) -> list[tuple[float, Run, RunRecord]]:
    """The schedules that were screened, each at the best of its learning rates, and their losses less the full model's
    for the same FLOPs; the best first."""
    frontier, found = short_frontier(records), []
    for runs in _schedules().values():
        done = [run for run in runs if run in records]
        pairs = zip(done, records.of(done), strict=True)
        if done:
            run, record = min(pairs, key=lambda pair: pair[1].outcome["val_loss"])
            found.append((_against(frontier, record), run, record))
    return sorted(found, key=lambda entry: (math.isnan(entry[0]), entry[0]))


def repeated(records: Records) -> str:
    """On little text: what every run ends with, and the lowest loss that it had on the way."""
    runs = runs_with(group="repeated")
    rows, longest = [], max((record.outcome["flops_total"] for record in records.of(runs)), default=math.nan)
    for run in runs:
        if run not in records:
            rows.append((run.says, f"{float(run.lr):g}", "", MISSING, ""))
            continue
        [record] = records.of([run])
        lowest = np.nanmin(record.column("val/loss"))
        spent = f"{record.outcome['flops_total'] / longest:.3f}"
        rows.append((run.says, f"{float(run.lr):g}", spent, f"{record.outcome['val_loss']:.4f}", f"{lowest:.4f}"))
    table = _table(("schedule", "lr", "FLOPs", "loss", "lowest on the way"), rows)
    return table + _figure("repeated", "Loss against training compute, on a tenth of the text", records, "repeated-")


def full_frontier(records: Records) -> str:
    """The runs of the full model that the screens are held against."""
    runs = sorted(records.of(_frontier_runs()), key=lambda run: -run.outcome["steps"])
    rows = [
        (f"{run.outcome['steps']:,.0f}", format_flops(run.outcome["flops_total"]), f"{run.outcome['val_loss']:.4f}")
        for run in runs
    ]
    return _table(("steps", "FLOPs", "loss"), rows)


def short_frontier(records: Records) -> Frontier:
    return Frontier.of(records.of(_frontier_runs()))


def origins(records: Records) -> str:
    """Code, interpreter and machine of the records."""
    known = [content["environment"] for content in records.contents.values()]
    commits = sorted({entry["git"]["commit"][:7] for entry in known if entry["git"]})
    machines = sorted({f"Python {e['python']}, torch {e['torch']}, {e['cpu']}" for e in known})
    corpus = (records.corpus or "")[:16]
    return f"Code: {', '.join(commits)}. {'; '.join(machines)}; text `stdlib-{corpus}`." if known else "No run yet."


TABLES: dict[str, Callable[[Records], str]] = {
    "budget": budget_table,
    "learning rates": learning_rates,
    "learning rates, open": tuned_at_an_edge,
    "headline": headline,
    "headline, in words": headline_says,
    "lengths": lengths,
    "second rate": second_rate_says,
    "candidates": candidates,
    "best, in words": best_says,
    "goal": goal_says,
    "short runs": short_arms,
    "short runs, in words": short_arms_say,
    "full model": full_frontier,
    "screens": screens,
    "repeated": repeated,
    "origins": origins,
}
"""By the name that docs/study.md has between its markers."""

ARM_WORDS = {
    EST: "EST",
    FULL: "full, same tokens",
    FULL_SAME_FLOPS: "full, same FLOPs",
}


def _schedules() -> dict[str, list[Run]]:
    """What is screened, and its runs; EST as the paper has it is the arm that the learning rates were tried on."""
    return _by_words([*runs_with(group="lr", arm=EST), *schedules_of("screen")])


def _long_runs(records: Records) -> dict[str, _LongRuns]:
    """What is trained as long as the headline and held against the full model."""
    schedules = _by_words([*runs_with(group="headline", arm=EST), *schedules_of("candidate")])
    return {says: _LongRuns.of(records, runs) for says, runs in schedules.items()}


def _by_words(runs: list[Run]) -> dict[str, list[Run]]:
    schedules: dict[str, list[Run]] = {}
    for run in runs:
        schedules.setdefault(run.says, []).append(run)
    return schedules


def tuned_runs() -> list[Run]:
    return [run for arm in ARMS for run in runs_with(group="lr", arm=arm, lr=TUNED[arm])]


def _frontier_runs() -> list[Run]:
    """The full model, tuned, for fewer and more steps."""
    return [run for run in [*tuned_runs(), *runs_with(group="screen")] if run.arm in (FULL, FULL_SAME_FLOPS)]


def _arms_table(records: Records, runs: list[Run]) -> str:
    arms = {arm.name: arm for arm in Verdict.of(records.of(runs)).arms}
    asked = len(SEEDS) if len(runs) > len(ARMS) else 1
    full = arms[FULL].flops.mean() if FULL in arms else math.nan
    rows = []
    for name in ARMS:
        if name not in arms:
            rows.append((ARM_WORDS[name], f"0 of {asked}", MISSING, "", ""))
            continue
        arm = arms[name]
        loss = f"{arm.val_loss.mean():.4f}"
        loss += f" ± {arm.val_loss.std(ddof=1):.4f}" if len(arm.val_loss) > 1 else ""
        relative = f"{arm.flops.mean() / full:.3f}" if math.isfinite(full) else "-"
        rows.append((ARM_WORDS[name], f"{len(arm.seeds)} of {asked}", loss, format_flops(arm.flops.mean()), relative))
    return _table(("arm", "seeds", "loss", "FLOPs", "of full"), rows)


def _sentences(records: Records, runs: list[Run]) -> str:
    """EST against the other two arms. Not in seconds: these runs share their cores with other work."""
    arms = {arm.name: arm for arm in Verdict.of(records.of(runs)).arms}
    if EST not in arms or len(arms) == 1:
        return f"Nothing to compare: the arms are {MISSING}."
    said, est = [], arms[EST]
    if FULL in arms:
        saved = format_percent(1 - est.flops.mean() / arms[FULL].flops.mean())
        said.append(
            f"For the same tokens EST spends {saved} fewer FLOPs, and {against(est, arms[FULL])} the full model's."
        )
    if FULL_SAME_FLOPS in arms:
        said.append(f"For the same FLOPs {against(est, arms[FULL_SAME_FLOPS])} the full model's.")
    return " ".join(said)


def _tuned_loss(records: Records, group: str, arm: str) -> float | None:
    """Of the first seed, at the arm's best learning rate."""
    return _loss(records, group=group, arm=arm, lr=TUNED[arm], seed=SEEDS[0])


def _loss(records: Records, **fields: object) -> float | None:
    """Final loss of the one run that has these fields; None where it is not done."""
    [run] = runs_with(**fields)
    return records.of([run])[0].outcome["val_loss"] if run in records else None


def _against(frontier: Frontier, run: RunRecord) -> float:
    return run.outcome["val_loss"] - frontier.loss_at(run.outcome["flops_total"])


def _saved(frontier: Frontier, run: RunRecord) -> str:
    """Of the FLOPs of the full model's whole run."""
    return _percent(1 - run.outcome["flops_total"] / frontier.flops[-1]) if len(frontier.flops) else "-"


def _saved_at_equal_loss(frontier: Frontier, run: RunRecord) -> str:
    """How much less than the full model it spent for the loss that it reached."""
    return _percent(1 - run.outcome["flops_total"] / frontier.flops_at(run.outcome["val_loss"]))


def _over_seeds(values: Sequence[float], form: str) -> str:
    """`2.2782 ± 0.0031`; without a spread where there is one seed, a dash where a value could not be had."""
    if not all(map(math.isfinite, values)):
        return "-"
    spread = f" ± {form.replace('+', '').format(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return (form.format(np.mean(values)) + spread).replace("-", "−")


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _figure(name: str, shows: str, records: Records, *prefixes: str) -> str:
    """The figure, where runs whose names begin with one of `prefixes` are there to be shown."""
    shown = any(run.startswith(prefixes) for run in records.contents)
    return f"\n\n![{shows}](study/{name}.svg)" if shown else ""


def _difference(value: float) -> str:
    return f"{abs(value):.4f} {'below' if value < 0 else 'above'}"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _percent(share: float) -> str:
    return format_percent(share).replace("-", "−") if math.isfinite(share) else "-"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−") if math.isfinite(value) else "-"
