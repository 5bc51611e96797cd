"""The site that `make docs` builds: complete, readable at any width, and searched without a network, in a real browser."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SEARCHES = {"validation": "training/", "filter": "how-to/", "256": "tokenizers/", "img2dataset": "how-to/"}
"""What a newcomer types, and a page that has to be among the first ten."""
DIAGRAMS = {"flow/": 2, "order/": 1}
DRAW = """
import json, diagrams
print(json.dumps({draw.__name__: draw().svg() for draw in (diagrams.flow, diagrams.loader, diagrams.order)}))
"""
OUTSIDE_ITS_BOX = """() => [...document.querySelectorAll("svg > g, svg > text")].flatMap(part => {
  const frame = part.querySelector("rect") ?? part.ownerSVGElement;
  const outer = frame.getBoundingClientRect();
  return [...(part.matches("text") ? [part] : part.querySelectorAll("text")), frame].filter(inner => {
    const box = inner.getBoundingClientRect();
    return box.left < outer.left || box.right > outer.right || box.top < outer.top || box.bottom > outer.bottom;
  }).map(inner => inner.textContent);
})"""
"""Texts of a diagram that leave their box, or the picture."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(module, reason="pip install 'wds-tools[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), "the site is built without a warning"
    return folder


@pytest.fixture
def page(site: Path, browser: Browser) -> Iterator[Page]:
    """A page of the site, served on this machine; a request to anywhere else is a failure."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}/"
        context = browser.new_context(base_url=base)
        requests: list[str] = []
        context.on("request", lambda request: requests.append(request.url))
        yield context.new_page()
        context.close()
        server.shutdown()
        thread.join()
    assert [url for url in requests if not url.startswith((base, "data:", "blob:"))] == []


@pytest.mark.slow
def test_the_site_begins_with_the_readme_and_loads_nothing_from_elsewhere(site: Path) -> None:
    assert "From a folder of pictures to a training batch" in (site / "index.html").read_text()
    pages = "".join(page.read_text() for page in site.rglob("*.html"))
    assert re.findall(r'(?:<script[^>]* src|<img[^>]* src|<link[^>]*stylesheet"? href)="?(https?://[^" >]+)', pages) == []


@pytest.mark.slow
def test_the_reference_has_the_fields_of_configs_and_the_arguments_of_functions(site: Path) -> None:
    train = (site / "reference/train/index.html").read_text()
    for name in ("LoaderConfig.batch_size", "Source.weight", "World.from_mesh", "Loader.state_dict", "SequenceConfig.max_length"):
        assert re.search(rf'id="[\w.]+\.{re.escape(name)}"', train), name
    assert "Samples of a batch over all ranks." in train
    assert "replaced by &lt;unconditional&gt;" in train, "a mark in a docstring is text, not an HTML tag that vanishes"
    locations = [entry["location"] for entry in json.loads((site / "search/search_index.json").read_text())["docs"]]
    assert sum(location.startswith("reference/") for location in locations) > 300


@pytest.mark.slow
def test_the_search_finds_what_a_newcomer_types(page: Page) -> None:
    for words, expected in SEARCHES.items():
        page.goto("")
        page.locator("input.md-search__input").click()
        page.fill("input.md-search__input", words)
        page.locator(".md-search-result__link").first.wait_for()
        links = [link.get_attribute("href") or "" for link in page.locator(".md-search-result__link").all()]
        assert any(f"/{expected}" in link for link in links[:10]), (words, links[:10])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_page_and_no_diagram_is_cut_off_on_a_phone_and_on_a_wide_screen(page: Page, site: Path) -> None:
    pages = sorted(file.parent.relative_to(site).as_posix() for file in site.rglob("index.html"))
    for path in [name for name in pages if not name.startswith("decisions/2")]:  # words alone
        page.goto(path)
        for width in (360, 1400):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
            boxes = [image.bounding_box() for image in page.locator("article img").all() if image.is_visible()]
            assert all(box and box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes), path
            assert len(boxes) >= DIAGRAMS.get(f"{path}/", 0), path


@pytest.mark.slow
def test_the_texts_of_a_diagram_lie_in_their_boxes_and_the_pictures_are_those_that_make_pictures_draws(browser: Browser) -> None:
    drawn = subprocess.run([sys.executable, "-c", DRAW], cwd=ROOT / "docs", capture_output=True, text=True, check=True).stdout
    for name, svg in json.loads(drawn).items():
        assert (ROOT / f"docs/{name}.svg").read_text() == svg
        page = browser.new_page()
        page.set_content(svg)
        assert page.locator("svg text").count() > 10
        assert page.evaluate(OUTSIDE_ITS_BOX) == [], name
        page.close()
