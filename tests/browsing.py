"""A page of the viewer in a real browser, as tests open and read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commands import wait_until

from wds_tools.view.server import ViewServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

SIZE = {"width": 1200, "height": 800}


class Watched:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Browser, server: ViewServer, **context: Any) -> None:
        self.context = browser.new_context(viewport=SIZE, **context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.base = server.url.rstrip("/")
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _hear(self, said: ConsoleMessage) -> None:
        if said.type in ("error", "warning") and not said.text.startswith("Canvas2D: Multiple readback"):  # by these tests
            self.problems.append(said.text)

    def open(self, path: str) -> Page:
        self.page.goto(self.base + path)
        return self.page


def until(page: Page, condition: str, timeout_s: float = 20) -> None:
    """Wait until it holds. Not Playwright's own way, which evaluates text in the page: the page's policy forbids that."""
    wait_until(lambda: page.evaluate(condition), condition, timeout_s=timeout_s)


def keys_shown(page: Page) -> list[str]:
    page.wait_for_selector("#cards:not(.stale) .card, .state:not(.stale .state)")
    return page.locator(".card .foot .mono").all_inner_texts()
