"""A viewer for the browser to look at, and a page that must stay without a fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import Watched
from viewer import serving, write_set

from wds_tools.view.server import ViewServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("browser") / "set")


@pytest.fixture(scope="module")
def server(folder: Path, browser: Browser) -> Iterator[ViewServer]:
    with serving(folder, device="cpu") as server:
        yield server


@pytest.fixture
def watched(browser: Browser, server: ViewServer) -> Iterator[Watched]:
    watched = Watched(browser, server)
    yield watched
    outside = [url for url in watched.requests if not url.startswith((watched.base, "blob:", "data:"))]
    watched.context.close()
    assert watched.problems == []
    assert outside == []
