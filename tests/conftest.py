"""What every test stands on: quiet threads, no network, no traces, and nothing that is silently skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Before torch is imported anywhere, and inherited by the processes that tests start.
os.environ["OMP_WAIT_POLICY"] = "ACTIVE"  # with a short count, as psd sets it
os.environ["GOMP_SPINCOUNT"] = "3000"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # which share the cores
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, max(1, (os.cpu_count() or 1) // WORKERS))))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

# What CI's machines cannot have; everything else that a test needs, they must.
SKIPPED_IN_CI = ("needs a CUDA device",)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.fixture(scope="session", autouse=True)
def psd_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Gradio's cache and the app's runs go: an empty folder, set in the environment."""
    home = tmp_path_factory.mktemp("psd-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(home / "gradio"))
        yield home


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the system's Chromium for Playwright's `executable_path`; without one the test is skipped."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium found: install it (Debian and Ubuntu: apt install chromium)")
    return path


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def app_url(psd_home: Path) -> str:
    """The app in a process of its own."""
    from tests import app_server

    return app_server.address()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """In CI a skipped test is a failed one, unless its reason is allowed there: else nothing would notice that it does
    not run."""
    report = yield
    return stricter(report) if in_ci() else report


def stricter(report: pytest.TestReport) -> pytest.TestReport:
    """The report as CI takes it."""
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    expected = hasattr(report, "wasxfail") or any(allowed in reason for allowed in SKIPPED_IN_CI)
    if report.skipped and not expected:
        report.outcome = "failed"
        report.longrepr = f"every test must run in CI, but this one was skipped: {reason}"
    return report
