"""The files of a report: self-contained, escaped, and inside the folder that was asked for."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest

from est_cli.reports.records import load_runs
from est_cli.reports.report import FORMATS, write_compute_and_time, write_report


class Page(HTMLParser):
    """Tags that are open at the end, the ids, and every address that the page refers to."""

    void = ("meta", "input", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_all_formats_are_written_and_named(one_report):
    names = {kind: path.name for kind, path in one_report.items()}
    assert names == {"html": "report.html", "png": "report.png", "csv": "runs.csv"}
    assert one_report["png"].read_bytes().startswith(b"\x89PNG")
    pictures = {path.stem for path in (one_report["png"].parent / "figures").iterdir()}
    losses = {f"loss_{axis}" for axis in ("steps", "tokens", "flops", "seconds")}
    assert pictures == {*losses, "savings", "stage_time", "coverage"}


def test_the_page_is_well_formed_and_refers_to_nothing_outside(sweep_report):
    page = Page(sweep_report["html"].read_text())
    assert page.open == []
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_takes_its_colours_from_the_theme(sweep_report):
    drawings = re.findall(r"<svg .*?</svg>", sweep_report["html"].read_text(), flags=re.DOTALL)
    cells = re.compile(r"fill: (?:#0b0b0b|#fdfdfd)|<image")
    assert len(drawings) > 8
    assert all(cells.search(svg) for svg in drawings if re.search(r"(?:fill|stroke): #", svg))


def test_a_sweep_has_a_heat_map_and_tells_what_differs(sweep_report):
    text = sweep_report["html"].read_text()
    assert "Final validation loss over scheduler.stage1_end and scheduler.stage2_end" in text
    assert "<th>seed</th>" in text
    assert "optimizer.lr" not in text


def test_tables_alone_need_neither_matplotlib_nor_jinja(one, tmp_path):
    program = (
        "import sys; from est_cli.reports.report import *; run, out = map(Path, sys.argv[1:]);"
        "write_report(load_runs([run]), out, ['csv']); print({'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, one.folder, tmp_path]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "set()\n"
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", "curves.csv"}


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_have_every_run_with_what_differs_and_every_validation_loss(sweep_report, swept):
    rows, curves = read_csv(sweep_report["csv"]), read_csv(sweep_report["csv"].with_name("curves.csv"))
    assert [row["run"] for row in rows] == [run.name for run in swept]
    assert {row["scheduler.stage1_end"] for row in rows} == {"0.1", "0.2"}
    assert all(float(row["val_loss"]) > 3 and float(row["stage1_step_s_median"]) > 0 for row in rows)
    for run in rows:
        evaluated = [int(row["step"]) for row in curves if row["run"] == run["run"] and row["val_loss"]]
        assert evaluated == [19, 39, 59, 79, 99, 119]


HOSTILE_NAMES = ("<script>alert(1)</script>", "$\\frac{", "../../escape", "a\nb\x07 日本語 \udcff")


def test_names_are_shown_and_not_obeyed(new_run, tmp_path):
    made = [new_run(f"in/{i}", steps=40, kernels=f"kernel-{i}") for i in range(len(HOSTILE_NAMES))]
    runs = [
        dataclasses.replace(run, name=name, config=run.config | {"name": name})
        for run, name in zip(made, HOSTILE_NAMES, strict=True)
    ]
    out = tmp_path / "deep" / "er" / "out"
    text = write_report(runs, out, ("html", "csv"))["html"].read_text()
    assert write_compute_and_time(runs, out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    Page(text)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert {path.name for path in tmp_path.iterdir()} == {"in", "deep"}
    assert {path.name for path in (tmp_path / "deep" / "er").iterdir()} == {"out"}


@pytest.mark.parametrize(("done", "formats"), [(0, FORMATS), (1, ("html", "csv"))])
def test_a_run_that_has_just_begun_has_a_report(new_run, tmp_path, done, formats):
    files = write_report([new_run(steps=60, done=done, finished=False)], tmp_path / "out", formats)
    assert set(files) == set(formats) and all(path.is_file() for path in files.values())
    assert all("unfinished" in path.read_text() for kind, path in files.items() if kind != "png")


def test_a_run_without_config_and_summary_is_told_by_its_metrics(one, tmp_path):
    lines = (one.folder / "metrics.jsonl").read_text().splitlines()[:120]
    losses = [json.loads(line)["val/loss"] for line in lines[:60]]
    lines[60:] = [re.sub(r'"(train|val)/loss": [^,]+', r'"\1/loss": NaN', line) for line in lines[60:]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(load_runs([tmp_path]), tmp_path / "out", ("html",))["html"].read_text()
    assert "no config.yaml" in page
    assert re.search(r'<td class="n">2</td>\s*<td class="n">40–119</td>', page)
    assert f"<strong>{[loss for loss in losses if loss][-1]:.4f}</strong>" in page  # the last one that is a number


@pytest.mark.slow
def test_a_million_lines_are_reported_in_ten_seconds(new_run, tmp_path):
    folder = new_run(steps=1_000_000, done=1000, finished=False).folder
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1_000_000):
            file.write(lines[step // 1000].replace(f'"step": {step // 1000}', f'"step": {step}', 1) + "\n")
    start = time.process_time()
    runs = load_runs([folder])
    assert time.process_time() - start < 5
    files = write_report(runs, tmp_path / "out")
    spent = time.process_time() - start
    (folder / "metrics.jsonl").unlink()
    assert "Read 1,000,000 logged lines" in files["html"].read_text()
    assert spent < 10
