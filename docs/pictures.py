"""Draws the pictures of the README: `make pictures`. Its photographs are in the public domain or CC0, from scikit-image's wheel.

docs/decoded.jpg: photographs above, the pictures that their codes decode to below. docs/viewer.webp: one of them in the viewer,
photographed in Chromium, which Playwright drives.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from wds_tools.view.server import ViewConfig, ViewServer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from demo import SHOWN, draw, gather_pairs, run  # noqa: E402

SIZE = {"width": 1200, "height": 760}


def photograph(dataset: Path, picture: Path) -> None:
    """Photograph the viewer's page of the second sample, the cat."""
    os.chdir(dataset.parent)  # the page shows the dataset's place as it was named
    server = ViewServer(ViewConfig(input=dataset.name, port=0, device="cpu"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SIZE)
        page.goto(f"{server.url.rstrip('/')}/sample/1", wait_until="networkidle", timeout=120_000)
        page.wait_for_timeout(2_000)
        image = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    server.shutdown()
    thread.join()
    server.server_close()
    image.convert("RGB").save(picture, quality=85, method=6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pairs, raw, encoded = gather_pairs(Path(folder) / "input", SHOWN), Path(folder) / "raw", Path(folder) / "photographs"
        run("convert", "pairs", "--input", pairs, "--output", raw, "--max-rejects", 1)
        run("encode", "--input", raw, "--output", encoded, "--tokenizer", "tiny", "--keep-images")
        draw(pairs.parent / "images", encoded, ROOT / "docs/decoded.jpg")
        photograph(encoded, ROOT / "docs/viewer.webp")
