"""The wheel: everything inside, and it works from another directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_every_source_file_and_all_of_conf_are_in_the_wheel(wheel):
    expected = {f"est_cli/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    sources = [path for path in (ROOT / "est_cli").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert expected and sources
    assert expected | {str(path.relative_to(ROOT)) for path in sources} <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_installed_wheel_answers_from_another_directory(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -P keeps the checkout off the path; an editable install must not win over the wheel either.
    code = "import est_cli, sys; assert 'site' in est_cli.__file__; from est_cli.commands.train import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "--cfg", "job"], cwd=elsewhere, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "n_layers: 4" in done.stdout
