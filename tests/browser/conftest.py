"""The browser of the tests in this folder: the machine's own Chromium, without a window."""

import os
import shutil

import pytest

PLACES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="package")
def chromium():
    """A Chromium; skipped where playwright or Chromium is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test-browser)")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PLACES)), None)
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium, or set CHROMIUM)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
