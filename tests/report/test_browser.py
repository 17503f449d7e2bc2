"""The page in a real browser: it shows its tables and curves, asks the network for nothing, and fits a phone.

The browser talks to a proxy of ours, which answers nothing and remembers every request, so "nothing was fetched" is
observed and not inferred. Without a Chromium the tests are skipped with the reason; LRA_REQUIRE_BROWSER=1 (set in CI)
turns the skip into a failure.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lra.report import build_report
from tests.report.test_chains import chains as chains

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
# What the browser asks of its maker on its own behalf, also for an empty page; the proxy refuses that too.
OWN_HOSTS = re.compile(r"(^|[/.])(google|googleapis|gvt1|gstatic)\.com([:/]|$)")
Browse = Callable[..., str]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        message = f"None of {', '.join(NAMES)} is on PATH."
        if os.environ.get("LRA_REQUIRE_BROWSER") == "1":
            pytest.fail(message + " LRA_REQUIRE_BROWSER=1 forbids skipping.")
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def requests() -> Iterator[list[str]]:
    """Every request that reached the proxy."""
    seen: list[str] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            seen.append(f"{self.command} {self.path}")
            self.send_error(403)

        do_GET = do_POST = do_HEAD = do_CONNECT = answer

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    seen.append(f"127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield seen
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browse(browser: str, requests: list[str], tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Open a page with the given flags in a browser with an empty profile; return what it printed."""

    def run(page: Path, *flags: str) -> str:
        profile = tmp_path_factory.mktemp("profile")
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--proxy-server=http://{requests[0]}", *flags]
        # The browser keeps caches of its own below the home folder, which may be read-only.
        environment = {**os.environ, "HOME": str(profile), "LC_ALL": "C.UTF-8"}
        done = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        return done.stdout.decode("utf-8")

    return run


@pytest.fixture(scope="module")
def page(built: Path) -> Path:
    return built / "index.html"


@pytest.fixture(scope="module")
def document(browse: Browse, page: Path) -> str:
    return browse(page, "--dump-dom")


def test_browser_shows_tables_and_curves(document: str) -> None:
    assert document.count("<table") >= 12
    assert len(re.findall(r'<svg [^>]*aria-label="Training loss and validation accuracy', document)) == 6
    assert len(re.findall(r"<path\b", document)) > 100
    for text in ("Paper track, nystrom protocol", "validation accuracy (%)", "The loss became NaN at step 812."):
        assert text in document


def test_browser_parses_the_page_as_it_was_written(document: str, page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    for tag in ("table", "tr", "td", "th", "figure", "details", "section", "svg", "dd"):
        assert len(re.findall(rf"<{tag}\b", document)) == len(re.findall(rf"<{tag}\b", written)), tag


def test_nothing_is_fetched_from_the_network(document: str, requests: list[str]) -> None:
    assert not re.search(r'\b(?:src|srcset|href|action|data)="(?!#)', document)
    assert not re.search(r"google|gstatic|gvt1", document)
    assert [r for r in requests[1:] if not OWN_HOSTS.search(r)] == []


def test_the_proxy_would_have_seen_a_fetch(browse: Browse, requests: list[str], tmp_path: Path) -> None:
    leaky = tmp_path / "leaky.html"
    leaky.write_text('<img src="http://report.invalid/x.png">')
    browse(leaky, "--dump-dom")
    assert "GET http://report.invalid/x.png" in requests
    requests.remove("GET http://report.invalid/x.png")


@pytest.mark.parametrize(("width", "height"), [(1280, 1600), (500, 1600)])
def test_screenshot_has_dark_text_on_white(browse: Browse, page: Path, tmp_path: Path, width: int, height: int) -> None:
    shot = tmp_path / "page.png"
    browse(page, f"--window-size={width},{height}", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (height, width)
    assert (pixels > 230).mean() > 0.8
    assert (pixels < 90).mean() > 0.005


def test_page_is_no_wider_than_a_phone(browse: Browse, page: Path, tmp_path: Path) -> None:
    # The page has no script; a page of ours frames it and measures. 400 px is below the browser's least window.
    probe = tmp_path / "probe.html"
    probe.write_text(
        '<iframe id="f" style="width:400px;height:800px;border:0"></iframe><p id="out"></p><script>'
        'const f = document.getElementById("f"); f.onload = () => { const d = f.contentDocument.documentElement;'
        'document.getElementById("out").textContent = `width ${d.scrollWidth} of ${d.clientWidth}`; };'
        f"f.srcdoc = {_script_text(page)};</script>",
        encoding="utf-8",
    )
    assert "width 400 of 400" in browse(probe, "--dump-dom", "--virtual-time-budget=5000")


def test_pictures_of_attention_are_shown_and_nothing_is_fetched(
    browse: Browse, requests: list[str], chains: Path, tmp_path: Path
) -> None:
    build_report([chains], tmp_path / "report")
    page = tmp_path / "report" / "index.html"
    document = browse(page, "--dump-dom")
    assert document.count("<svg ") == 4 and document.count("data:image/png") == 24
    assert not re.search(r'\b(?:src|srcset|href|action|data)="(?!#|data:image/png;base64,)', document)
    assert [r for r in requests[1:] if not OWN_HOSTS.search(r)] == []
    shot = tmp_path / "page.png"
    browse(page, "--window-size=1280,3200", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    # The pale orange of attention; with pictures blocked there are 2,400 such pixels, at the rims of lines.
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((red > 215) & (green > 130) & (green < 225) & (blue < green - 20)).sum() > 4500


def test_page_prints_every_run(browse: Browse, page: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "page.pdf"
    browse(page, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) > 8


def _script_text(page: Path) -> str:
    return json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
