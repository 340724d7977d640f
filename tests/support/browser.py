"""A real Chromium for tests of pages: the marks of such a test, the browser, and a page in it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None

in_chromium = [
    pytest.mark.chromium,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="pip install 'vlmrl[browser]'"),
]
"""`pytestmark` of a module whose tests use the fixture `browser`."""


@contextmanager
def opened_browser() -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        # A container's root has no user namespaces, which Chromium's sandbox needs.
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Tab:
    """A page in a browser, with its console messages and its requests. On leaving, there must be no complaint and no
    request of anything outside the file."""

    def __init__(
        self,
        browser: Any,
        file: Path,
        place: str = "",
        *,
        width: int = 1440,
        theme: str = "light",
        draws_itself: bool = True,
    ) -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, accept_downloads=True
        )
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{file.as_uri()}{place}")
        if draws_itself:
            # Not wait_for_function: while it polls it evaluates a text, which the page's security policy forbids.
            self.page.locator("html[data-ready]").wait_for(state="attached")

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *failed: object) -> None:
        self.page.context.close()
        if failed[0] is None:
            assert self.complaints == []
            assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []

    @property
    def ready_ms(self) -> float:
        return float(self.page.evaluate("document.documentElement.dataset.ready"))

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def shown(self) -> list[str]:
        """Ids of the rollouts in the list."""
        labels = self.page.locator(".cell").evaluate_all("cells => cells.map(cell => cell.getAttribute('aria-label'))")
        return [label.split(":")[0] for label in labels]

    def fill(self, *labels_and_values: str) -> None:
        for label, value in zip(labels_and_values[::2], labels_and_values[1::2], strict=True):
            self.page.get_by_label(label, exact=True).fill(value)

    def open(self, rollout_id: str) -> None:
        self.page.locator(f'.cell[aria-label^="{rollout_id}:"]').click()

    def download(self, name: str) -> str:
        with self.page.expect_download() as waiting:
            self.page.get_by_role("button", name=name, exact=True).first.click()
        path = waiting.value.path()
        return Path(path).read_text()
