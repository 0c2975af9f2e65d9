"""est-export: a run's model, or a subnetwork of it, as a Hugging Face folder."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from est_cli import evaluation, model
from est_cli.commands.entry import read_request, run_composed
from est_cli.config import Format, Natural
from est_cli.errors import UserError, say
from est_cli.subnet.schedule import Rate, Rates


@dataclass(frozen=True)
class Request:
    run: str | None
    to: Literal["hf"]
    out: str | None
    plan_step: Natural | None
    heads: Rate | None
    mlp: Rate | None
    layers: Rate | None
    format: Format


def main() -> None:
    run_composed("export", run)


def run(composed: dict[str, Any]) -> None:
    """Write the folder that `out=` names; raises UserError for bad input."""
    request = read_request(Request, composed, run="a run directory", out="a folder to write")
    rates = {name: rate for name in ("heads", "mlp", "layers") if (rate := getattr(request, name)) is not None}
    if request.plan_step is not None and rates:
        raise UserError(
            f"plan_step={request.plan_step}: goes without {' and '.join(rates)}, which name another subnetwork"
        )
    destination = Path(request.out).expanduser().absolute()
    evaluation.export.check_free(destination)
    opened = evaluation.run.open_run(Path(request.run), say)
    exported = reference = opened.model.cpu()
    if request.plan_step is not None or rates:
        if rates:
            config = replace(opened.config, model=opened.model.config)
            subnet = evaluation.run.sampled_with(config, Rates(**rates))
        else:
            subnet = evaluation.run.sampled_at(opened.config, request.plan_step, opened.checkpoint.step)
        model.huggingface.family_of(subnet.shape.model)
        reference = evaluation.run.packed(exported, subnet)
        exported = evaluation.run.standalone(reference, subnet)
    tokenizer = evaluation.run.run_tokenizer(opened, say)
    difference = evaluation.export.export(exported, reference, tokenizer, destination)
    if difference is None:
        say("transformers is not installed: the folder was written, and not checked (pip install transformers)")
    if request.format == "json":
        print(json.dumps({"out": str(destination), "max_logit_difference": difference}))
        return
    print(f"out: {destination}")
    if difference is not None:
        print(f"checked: loads with transformers; logits differ from ours by at most {difference:.1e}")
