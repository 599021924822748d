"""The documentation as a site: it builds without a warning, and a browser opens every page of it and searches it."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: make setup-docs")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """--strict: a link or an anchor that leads nowhere, or a page that no menu has, is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_name_of_the_package_is_on_the_page_of_python(site):
    import prune_opd

    page = (site / "api/index.html").read_text()
    for name in prune_opd.__all__:
        assert re.search(rf'<h3 id="prune_opd\.[\w.]*{name}"', page), name


def test_nothing_comes_from_another_host(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="(http[^"]*)', page.read_text()
        )
        assert not loaded, (page, loaded)


@pytest.mark.slow
def test_a_browser_opens_every_page_and_finds_a_word(address, site, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    pages = sorted(page.parent.relative_to(site).as_posix() for page in site.rglob("index.html"))
    assert len(pages) >= 24
    for page in pages:
        browser.get(f"{address}/{page}/")
        assert browser.find_element(By.CSS_SELECTOR, "article h1").text
        assert [entry["message"] for entry in browser.get_log("browser")] == [], page
        wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{page} is {wide} pixels wider than the window"

    browser.get(f"{address}/")
    browser.execute_script("document.querySelector('label[for=__search]').click()")
    browser.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys("calibration")
    found = WebDriverWait(browser, 60).until(
        lambda b: b.find_elements(By.CSS_SELECTOR, ".md-search-result__item a[href*=gamma]")
    )
    assert found and browser.get_log("browser") == []

    if folder := os.environ.get("PRUNE_OPD_SCREENSHOTS"):  # to look at them
        for page in ("start/cpu", "benchmarks"):
            browser.get(f"{address}/{page}/")
            browser.save_screenshot(f"{folder}/{page.replace('/', '-')}.png")
