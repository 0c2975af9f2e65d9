"""The page in a real browser: no error in its console, and its script shows the numbers under the pointer."""

import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr", "--v=0"]
FLAGS += [f"--disable-{what}" for what in ("background-networking", "component-update", "sync")]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

POINTER = """<script>
addEventListener("load", () => {
  document.querySelector("label[for=axis-flops]").click();
  const plot = [...document.querySelectorAll("svg[data-hover=loss]")].find((svg) => svg.getBoundingClientRect().width);
  const box = plot.getBoundingClientRect();
  const at = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};
  plot.dispatchEvent(new PointerEvent("pointermove", at));
  document.title = "shown: " + document.querySelector(".tip").textContent;
});
</script></body>"""


def browse(page, folder, *flags):
    return subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


@pytest.fixture(scope="module")
def pages(one_report, sweep_report):
    return {"one": one_report["html"], "sweep": sweep_report["html"]}


@pytest.mark.parametrize("name", ["one", "sweep"])
def test_the_page_opens_from_disk_without_an_error_in_the_console(pages, name, tmp_path):
    picture = tmp_path / "page.png"
    done = browse(pages[name], tmp_path, f"--screenshot={picture}", "--window-size=1100,1600")
    assert picture.stat().st_size > 20_000
    assert "CONSOLE" not in done.stderr


def test_the_console_would_tell_an_error(pages, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(pages["one"].read_text().replace('"use strict";', '"use strict"; nothing();'))
    assert "CONSOLE" in browse(broken, tmp_path, f"--screenshot={tmp_path / 'page.png'}").stderr


def test_an_axis_can_be_chosen_and_the_pointer_shows_the_numbers_under_it(pages, tmp_path):
    moved = tmp_path / "moved.html"
    moved.write_text(pages["sweep"].read_text().replace("</body>", POINTER))
    title = browse(moved, tmp_path, "--dump-dom").stdout.split("<title>")[1].split("</title>")[0]
    assert title.startswith("shown: Training compute (TFLOP): ")
    assert title.count("validation 3.") + title.count("validation 4.") == 4


def test_the_page_prints(pages, tmp_path):
    browse(pages["one"], tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
