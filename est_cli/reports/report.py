"""Runs → an HTML page, PNG figures and CSV tables in one folder."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from est_cli.errors import UserError, nearest
from est_cli.reports.arms import Comparison
from est_cli.reports.records import RunRecord

FORMATS = ("html", "png", "csv")


def write_report(runs: Sequence[RunRecord], out: Path, formats: Sequence[str] = FORMATS) -> dict[str, Path]:
    """Writes report.html, report.png with figures/*.png, and runs.csv with curves.csv into `out`.

    Returns the main file of every format. All file names are fixed: nothing that a run is called leaves `out`.
    Raises UserError for a format that does not exist, or an `out` that is no folder.
    """
    _check(out, formats)
    comparison = Comparison.of(runs)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        name: out / file
        for name, file in (("html", "report.html"), ("png", "report.png"), ("csv", "runs.csv"))
        if name in formats
    }
    if "csv" in files:
        from est_cli.reports.csv_files import write_curves, write_runs

        write_runs(comparison, files["csv"])
        write_curves(comparison, out / "curves.csv")
    if "html" in files or "png" in files:
        with _without_glyph_warnings():
            _draw(comparison, out, files)
    return files


def try_report(folders: Sequence[Path], out: Path, formats: Sequence[str] = FORMATS) -> dict[str, Path] | str:
    """The files of `write_report`, or in words why there is none: runs that are done must not fail by their report."""
    from est_cli.reports.records import load_runs

    try:
        return write_report(load_runs(folders), out, formats)
    except Exception as error:
        return f"not written: {type(error).__name__}: {error}"


def write_compute_and_time(runs: Sequence[RunRecord], path: Path) -> Path:
    """Writes one PNG: loss against whole-model FLOPs, and against time."""
    from est_cli.reports import figures

    with _without_glyph_warnings(), figures.report_style():
        figures.save_png(figures.compute_and_time(Comparison.of(runs)), path)
    return path


def _check(out: Path, formats: Sequence[str]) -> None:
    problems = [
        f"formats={name}: must be one of {', '.join(FORMATS)}{nearest(name, FORMATS)}"
        for name in formats
        if name not in FORMATS
    ]
    taken = next((path for path in (out, *out.parents) if path.exists()), out)
    if taken.exists() and not taken.is_dir():
        problems.append(f"out={out}: {taken} is a file; must be a folder, or the name of a new one")
    if problems:
        raise UserError(*problems)


def _draw(comparison: Comparison, out: Path, files: dict[str, Path]) -> None:
    # matplotlib takes half a second to import, which a terminal report need not wait for.
    from est_cli.reports import figures
    from est_cli.reports.coverage import coverage
    from est_cli.reports.differences import swept_pairs
    from est_cli.reports.page import page

    found = coverage(_most_telling(comparison))
    with figures.report_style():
        drawings = []
        if any(run.n_rows for run in comparison.runs):
            drawings += figures.loss_drawings(comparison)
            drawings += [figures.savings_drawing(comparison), figures.stage_time_drawing(comparison)]
        drawings += [
            figures.sweep_drawing(comparison, pair, number)
            for number, pair in enumerate(swept_pairs(comparison.differing), 1)
        ]
        drawings += [] if isinstance(found, str) else [figures.coverage_drawing(found)]
        drawings = [drawing for drawing in drawings if drawing is not None]
        if "html" in files:
            files["html"].write_text(page(comparison, drawings, found), encoding="utf-8", errors="replace")
        if "png" in files:
            (out / "figures").mkdir(exist_ok=True)
            for drawing in drawings:
                figures.save_png(drawing.figure, out / "figures" / f"{drawing.name}.png")
            figures.save_png(figures.overview(comparison), files["png"])


def _most_telling(comparison: Comparison) -> RunRecord:
    """The best run that sampled subnetworks; where none did, the best run."""
    ranked = [run for arm in comparison.arms for run in arm.runs]
    return next((run for run in ranked if not all(stage.is_full for stage in run.stages)), ranked[0])


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """A run named in letters that the font lacks is drawn with boxes; the page has them right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
