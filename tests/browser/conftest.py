"""Pages in Chromium. Where it or Playwright is missing, every test here skips with one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import pages

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Opened:
    """A page that is open, and everything that it should not have done."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def open(self, address: str, width: int = 1280, scheme: str = "light") -> Any:
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        self.page.goto(address)
        return self.page


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests: Playwright is not installed")
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    if binary is None:
        pytest.skip("browser tests: Chromium is not installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=binary, args=ARGUMENTS, headless=True
        )
        yield context
        context.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Opened]:
    page = chromium.new_page()
    page.set_default_timeout(60_000)
    yield Opened(page)
    page.close()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, chromium: Any) -> dict[str, Path]:
    """Every kind of page, by name; made only where there is a browser to open it."""
    return pages.write_all(tmp_path_factory.mktemp("pages"))
