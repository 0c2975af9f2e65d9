"""The tables and sentences of docs/study.md, from the records only."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from est_cli.experiments.saving import FullModel, MeasuredArm, is_clear, over_seeds
from est_cli.reports.records import RunRecord
from est_cli.units import format_count, format_percent
from study import training
from study.grid import ARMS, FULL, GROUPS, LEARNING_RATES, SEEDS, SHORT, SIZES, SMALL, WARMUP, WINNER, runs_with
from study.records import ROOT, Records
from study.results import (
    Result,
    at_first_seed,
    headline,
    parameters,
    screened,
    times_of,
    winners,
)

MISSING = "not yet run"
_MICRO = ROOT / "docs" / "study" / "micro"
"""The records of the study that came before: models of 4 layers, on text that was read six times."""
_MICRO_ARMS = {
    "EST": "headline-est",
    "rates 0.75": "candidate-rates-0.75",
    "EST, boundaries 0.2 and 0.7": "candidate-longer",
}
_AGAINST = ("loss", "less full, same tokens", "less full, same FLOPs", "FLOPs saved at equal loss", "seconds saved")


def headline_table(records: Records) -> str:
    rows = []
    for size, group in ((size, group) for group in ("headline", "short") for size in SIZES):
        for arm, result in headline(records, size, group).items():
            runs = runs_with(group=group, size=size, arm=arm)
            cells = [_number(result.share, "{:.3f}"), *_against(result)] if result.runs else ["", MISSING, *[""] * 4]
            if arm.is_full and result.runs:
                # Against itself there is nothing to say.
                cells[2 if arm.name == FULL else 3 :] = ["-"] * (4 if arm.name == FULL else 3)
            rows.append((size, runs[0].warmup, arm.says, f"{len(result.runs)} of {len(runs)}", *cells))
    return _table(("size", "warmup", "schedule", "seeds", "FLOPs", *_AGAINST), rows)


def headline_says(records: Records) -> str:
    """The winner, a paragraph for every size."""
    said = []
    for (run, *_), result in winners(records):
        if run.group != "headline":
            continue
        layers, width, _ = SIZES[run.size]
        model, n = f"{run.size}, {layers} layers of width {width}", len(result.differences)
        if not n:
            said.append(f"**{model}**: {MISSING}.")
            continue
        tokens, size = result.runs[0].outcome["tokens"], parameters(result.runs[0])
        model += f", {format_count(size)} parameters, {tokens / size:.1f} tokens a parameter"
        unclear = n > 1 and not is_clear(result.differences)
        facts = f"{n} seed{'s' if n > 1 else ''}{', no clear difference' if unclear else ''}"
        _, same_tokens, same_flops, *shares = _against(result)
        saved = " and ".join(
            f"{s} of the {what}" for s, what in zip(shares, ("FLOPs", "seconds"), strict=True) if s != "-"
        )
        said.append(
            f"**{model}**: {ARMS[WINNER].says}. It spends {_percent(1 - result.share)} "
            f"fewer FLOPs than the full model for the same tokens. Its loss less the full model's is {same_tokens} for "
            f"the same tokens ({facts}), and {same_flops} for the same FLOPs. Saved at equal loss: {saved or '-'}."
        )
    return "\n\n".join(said)


def learning_rates(records: Records) -> str:
    """Loss at one seed of every arm that was tried at several rates, and which best rates are at an edge."""
    rows, edges = [], []
    warmups = {size: sorted({run.warmup for run in runs_with(size=size)}) for size in SIZES}
    for size, arm, warmup in ((s, arm, w) for s in SIZES for arm in ARMS.values() for w in warmups[s]):
        asked = {run.lr: run for run in at_first_seed(arm, size, warmup)}
        losses = losses_by_rate(records, arm.name, size, warmup)
        best = min(losses, key=losses.get, default=None)
        if len(asked) > 1 or (asked and warmup != SHORT and arm.name in (FULL, WINNER)):
            shown = dict.fromkeys(asked, MISSING) | {lr: f"{loss:.4f}" for lr, loss in losses.items()}
            shown |= {best: f"**{shown[best]}**"} if losses else {}
            rows.append((size, arm.says, warmup, *(shown.get(lr, "") for lr in LEARNING_RATES)))
        if len(losses) > 1 and best in (min(losses, key=float), max(losses, key=float)):
            edges.append(f"{arm.says} ({size}, warmup {warmup}, {float(best):g})")
    table = _table(("size", "schedule", "warmup", *(f"{float(lr):g}" for lr in LEARNING_RATES)), rows)
    return f"{table}\n\nBest at an edge of the rates that were tried: {'; '.join(edges) or 'none'}."


def losses_by_rate(records: Records, arm: str, size: str = SMALL, warmup: int = SHORT) -> dict[str, float]:
    """Final losses of the arm at one seed by learning rate, ascending."""
    runs = sorted(at_first_seed(ARMS[arm], size, warmup), key=lambda run: float(run.lr))
    return {run.lr: records.loss(run) for run in runs if run in records}


def baseline(records: Records) -> str:
    """The full model with one setting changed."""
    [plain] = runs_with(group="headline", size=SMALL, arm=ARMS[FULL], seed=SEEDS[0])
    rows = []
    for run in (plain, *runs_with(group="baseline")):
        if run in records and plain in records:
            loss = records.loss(run)
            rows.append((run.arm.says, f"{loss:.4f}", _number(loss - records.loss(plain), "{:+.4f}")))
        else:
            rows.append((run.arm.says, MISSING, ""))
    return _table(("trained as", "loss", "less the first row"), rows)


def screens(records: Records) -> str:
    """Every schedule at one seed, what saves most at equal loss first."""
    rows, missing = [], []
    for size, warmup in ((each, warmup) for each in SIZES for warmup in (SHORT, WARMUP[each])):
        found = screened(records, size, warmup)
        for run, result in found:
            cells = (warmup, f"{float(run.lr):g}", _number(result.share, "{:.3f}"), *_against(result)[:-1])
            rows.append((size, run.arm.says, *cells))
        done = {run.arm for run, _ in found}
        asked = [arm for arm in ARMS.values() if not arm.is_full and at_first_seed(arm, size, warmup)]
        missing += [f"{arm.says} ({size})" for arm in asked if arm not in done]
    table = _table(("size", "schedule", "warmup", "lr", "FLOPs", *_AGAINST[:-1]), rows)
    return f"{table}\n\nNot yet run: {'; '.join(missing)}." if missing else table


def lengths(records: Records) -> str:
    """The full model and the winner after fewer and more tokens."""
    rows, shown = [], [(seeds, result) for seeds, result in winners(records) if seeds[0].group != "headline"]
    for seeds, result in sorted(shown, key=lambda entry: (SIZES[entry[0][0].size], entry[0][0].steps)):
        size, steps = seeds[0].size, seeds[0].steps
        full = MeasuredArm(records.of([run.held_against[0] for run in seeds]), result.full)
        known = [*full.runs, *result.runs]
        ratio = known[0].outcome["tokens"] / parameters(known[0]) if known else 10 * steps / SIZES[size][2]
        rows.append(
            (
                *(size, f"{ratio:.1f}", f"{steps:,}", f"{len(result.differences)} of {len(seeds)}"),
                *(_over_seeds(arm.losses) if arm.runs else MISSING for arm in (full, result)),
                _over_seeds(result.differences, "{:+.4f}"),
                _percent(1 - result.share),
                _against(result)[3] if result.runs else "-",
            )
        )
    header = ("size", "tokens a parameter", "steps", "pairs", ARMS[FULL].says, ARMS[WINNER].says)
    tried = [run for group in ("length", "length-lr") for run in runs_with(group=group, arm=ARMS[FULL], seed=SEEDS[0])]
    rates = [
        f"{records.loss(run):.4f} at {float(run.lr):g}"
        for run in tried
        if run in records and run.steps > SIZES[run.size][2]
    ]
    table = _table((*header, "difference", "fewer FLOPs", "FLOPs saved at equal loss"), rows)
    said = f"The full model for twice the steps, seed {SEEDS[0]}, by learning rate: {'; '.join(rates) or MISSING}."
    return f"{table}\n\n{said}"


def micro(records: Records) -> str:
    """The earlier study in three rows, and what an untuned baseline would have said there."""
    old = Records(_MICRO)

    def by_seed(prefix: str) -> list[RunRecord]:
        return old.named(name for seed in range(3) if (name := f"{prefix}-seed{seed}") in old.contents)

    full = FullModel.of(by_seed("headline-full"), by_seed("headline-full_same_flops"))
    rows = []
    for says, prefix in _MICRO_ARMS.items():
        result = Result(by_seed(prefix), full, step_s=[])
        rows.append((says, len(result.runs), _percent(1 - result.share), *_against(result)[:-1]))
    table = _table(("schedule", "seeds", "fewer FLOPs", *_AGAINST[:-1]), rows)
    names = ("headline-est-seed0", "candidate-full_same_flops-4e-3-seed0", "headline-full_same_flops-seed0")
    est, *full_losses = (run.outcome["val_loss"] for run in old.named(names))
    at_est, at_own = (_number(est - loss, "{:+.4f}") for loss in full_losses)
    return (
        f"{table}\n\nSeed 0 of EST less the full model for the same FLOPs: {at_est} with EST's learning rate for both, "
        f"{at_own} with each at its own."
    )


def budget(records: Records) -> str:
    rows = []
    for group, what in GROUPS.items():
        runs = runs_with(group=group)
        missing = [run for run in runs if run not in records]
        rows.append((what, len(runs), len(runs) - len(missing), round(sum(map(training.minutes, missing)))))
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
    table = _table(("runs", "asked for", "done", "core-minutes to go"), rows)
    return (
        f"{table}\n\nMinutes are FLOPs at {training.GFLOPS:g} GFLOP/s, about what a busy core reaches; no evaluations."
    )


def origins(records: Records) -> str:
    """Code, interpreter and machine of the records."""
    known = [content["environment"] for content in records.contents.values()]
    commits = sorted({entry["git"]["commit"][:7] for entry in known if entry["git"]})
    machines = sorted({f"Python {e['python']}, torch {e['torch']}, {e['cpu']}" for e in known})
    times = times_of(records)
    timed = f" Steps were timed on {times['cpu']}, torch {times['torch']}, {times['threads']} thread." if times else ""
    text = f"text `packages-{(records.corpus or '')[:16]}`"
    return f"Code: {', '.join(commits)}. {'; '.join(machines)}; {text}.{timed}" if known else f"Runs: {MISSING}."


TABLES: dict[str, Callable[[Records], str]] = {
    "headline, in words": headline_says,
    "headline": headline_table,
    "learning rates": learning_rates,
    "baseline": baseline,
    "screens": screens,
    "lengths": lengths,
    "micro": micro,
    "budget": budget,
    "origins": origins,
}
"""By the name that docs/study.md has between its markers."""


def _against(result: Result) -> list[str]:
    """The cells under _AGAINST."""
    bound = "at least " if result.at_least else ""
    shares = [_percent(share) for share in (result.saved, result.seconds_saved)]
    differences = [_over_seeds(values, "{:+.4f}") for values in (result.to_full, result.to_same_flops)]
    return [_over_seeds(result.losses), *differences, *(share if share == "-" else bound + share for share in shares)]


def _over_seeds(values: np.ndarray, form: str = "{:.4f}") -> str:
    return over_seeds(values, lambda value: _number(value, form))


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _percent(share: float) -> str:
    return format_percent(share).replace("-", "−") if math.isfinite(share) else "-"


def _number(value: float, form: str) -> str:
    return form.format(value).replace("-", "−") if math.isfinite(value) else "-"
