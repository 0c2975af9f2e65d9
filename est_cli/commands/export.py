"""est-export: a run's model, or a subnetwork of it, as a Hugging Face folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from est_cli import evaluation, model
from est_cli.commands.entry import read_only
from est_cli.config import Format, Natural
from est_cli.errors import UserError, say
from est_cli.schema import read
from est_cli.subnet.schedule import Rate, Rates


def main() -> None:
    read_only("export", run)


def run(plain: dict[str, Any]) -> None:
    """Write the folder that `out=` names; raises UserError for bad input."""
    problems: list[str] = []
    folder = read(str | None, plain["run"], "run", problems)
    read(Literal["hf"], plain["to"], "to", problems)
    out = read(str | None, plain["out"], "out", problems)
    plan_step = read(Natural | None, plain["plan_step"], "plan_step", problems)
    given = {name: read(Rate | None, plain[name], name, problems) for name in ("heads", "mlp", "layers")}
    rates = {name: rate for name, rate in given.items() if rate is not None}
    kind = read(Format, plain["format"], "format", problems)
    if folder is None:
        problems.append("run: is missing; must be a run directory")
    if out is None:
        problems.append("out: is missing; must be a folder to write")
    if plan_step is not None and rates:
        problems.append(f"plan_step={plan_step}: goes without {' and '.join(rates)}, which name another subnetwork")
    if problems:
        raise UserError(*problems)
    destination = Path(out).expanduser().absolute()
    evaluation.export.check_free(destination)
    opened = evaluation.run.open_run(Path(folder), say)
    exported = reference = opened.model.cpu()
    if plan_step is not None or rates:
        subnet = _subnetwork(opened, plan_step, rates)
        model.huggingface.family_of(subnet.shape.model)
        reference = evaluation.run.packed(exported, subnet)
        exported = evaluation.run.standalone(reference, subnet)
    tokenizer = evaluation.run.run_tokenizer(opened, say)
    difference = evaluation.export.export(exported, reference, tokenizer, destination)
    if difference is None:
        say("transformers is not installed: the folder was written, and not checked (pip install transformers)")
    if kind == "json":
        print(json.dumps({"out": str(destination), "max_logit_difference": difference}))
        return
    console = Console()
    console.print(f"out: {destination}", soft_wrap=True, highlight=False, markup=False)
    if difference is not None:
        console.print(f"checked: loads with transformers; logits differ from ours by at most {difference:.1e}")


def _subnetwork(opened: "evaluation.run.OpenRun", plan_step: int | None, rates: dict[str, float]) -> Any:
    """The subnetwork of a step, or one sampled with the rates."""
    if rates:
        config = replace(opened.config, model=opened.model.config)
        return evaluation.run.sampled_with(config, Rates(**rates))
    return evaluation.run.sampled_at(opened.config, plan_step, opened.checkpoint.step)
