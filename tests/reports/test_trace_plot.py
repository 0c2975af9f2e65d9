"""A picture of a trace shows one step: its phases, and the innermost operations by kind."""

import json

import pytest

from est_cli.reports.trace_plot import Bar, kind_of, main, read_step


def event(category: str, name: str, ts: float, dur: float, tid: int = 1) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": tid}


STEPS = [event("user_annotation", f"ProfilerStep#{n}", 1e6 * n, length) for n, length in enumerate([9e3, 5e3, 1e3])]
INSIDE = [
    event("user_annotation", "forward", 1e6 + 500, 3e3),
    event("cpu_op", "aten::linear", 1e6 + 600, 2e3),
    event("cpu_op", "aten::mm", 1e6 + 700, 1e3),
    event("cpu_op", "aten::resolve_conj", 1e6 + 710, 1),
    event("cpu_op", "aten::add", 1e6 + 650, 400, tid=2),
    event("cpu_op", "aten::mm", 0, 100),
]


def write(folder, events):
    (folder / "stage-1.trace.json").write_text(json.dumps({"traceEvents": [*STEPS, *events, {"ph": "M"}]}))
    return folder / "stage-1.trace.json"


def test_the_median_step_is_shown_with_the_innermost_operations_or_a_gpus_kernels(tmp_path):
    phases, work = read_step(write(tmp_path, INSIDE))
    assert phases == [Bar("forward", 0.5, 3.0)]
    assert sorted(work, key=lambda bar: bar.start) == [Bar("aten::add", 0.65, 0.4), Bar("aten::mm", 0.7, 1.0)]
    kernels = [event("kernel", "nvjet_tst", 1e6 + 900, 50)]
    assert read_step(write(tmp_path, [*INSIDE, *kernels])) == (phases, [Bar("nvjet_tst", 0.9, 0.05)])


def test_operations_have_kinds():
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert {kind_of(name) for name in ("aten::mm", "aten::addmm", "aten::bmm")} == {"matrix products"}
    assert kind_of(attention) == "attention"
    assert {kind_of(name) for name in ("aten::_fused_adamw_", "aten::gelu")} == {"everything else"}


def test_the_command_draws_and_says_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["trace_plot", *map(str, arguments)])
        main()

    write(tmp_path, INSIDE)
    run(tmp_path, tmp_path / "out.svg")
    assert "forward 3" in (tmp_path / "out.svg").read_text()
    for text in ("no json", "{}", '{"traceEvents": []}'):
        (tmp_path / "stage-1.trace.json").write_text(text)
        with pytest.raises(SystemExit) as exit:
            run(tmp_path, tmp_path / "out.svg")
        assert exit.value.code == 2 and str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path / "nothing", tmp_path / "out.svg")
    assert "holds no *.trace.json" in capsys.readouterr().err
