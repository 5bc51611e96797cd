"""`make demo` does the whole job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from wds_tools.dataset.reader import read_manifest
from wds_tools.storage import open_store

pytest.importorskip("skimage", reason="the demo's photographs are scikit-image's: pip install scikit-image")
ROOT = Path(__file__).parents[2]


def python(folder: Path, *args: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the demo ran, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, python(folder, str(ROOT / "examples" / "demo.py"), "demo-out")


@pytest.mark.slow
def test_the_demo_converts_encodes_verifies_streams_and_exports(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    assert printed.count("verify: all is well") == 3
    assert printed.count("streamed once each") == 3
    for name, column, pairs in (("pairs-512", "vqcode_512", 18), ("pairs-multi", "vqcode_multi768", 20)):
        manifest = read_manifest(open_store(str(folder / "demo-out" / name)))
        assert set(manifest.codes) == {column}
        assert manifest.samples == pairs
        assert manifest.source["input"]["rejects"]["missing_image"] == 1
    assert read_manifest(open_store(str(folder / "demo-out" / "dclm"))).samples > 50
    with Image.open(folder / "demo-out" / "decoded.png") as sheet:
        assert sheet.size == (256 * 6, 2 * 256 + 24)
