"""How long people wait for the viewer, on a dataset of a million samples in object storage: `python -m benchmarks.view`.

A SeaweedFS on loopback holds 100 shards of 10,000 samples: a caption of 8 to 40 words and 32 x 32 codes of the bundled tokenizer,
4.1 GB. Timed from outside: the command until its first page of samples has come; random pages and keys over HTTP; a search for
what is nowhere, so that it looks at all; the report; and in Chromium, if there is one, from a key press until the cards stand
there, while their pictures are being decoded. Memory is VmHWM. Writing the set is a third of the four minutes that it takes.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.s3 import serve_s3
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store

SAMPLES = 1_000_000
PAGE = 24
CODES = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": 4096, "stride": 16, "precision": "fp32"}}
WORDS = np.array(["a", "red", "green", "small", "dog", "cat", "house", "beside", "two", "people", "walking", "photograph", "of"])
TURN = """first => new Promise((done, failed) => {
    const begun = performance.now(), card = `#cards:not(.stale) [href="/sample/${first}"]`;
    const look = () => {
        const waited = performance.now() - begun;
        if (document.querySelector(card)) done(waited);
        else if (waited > 10000) failed(new Error(`no page from ${first} on`));
        else requestAnimationFrame(look);
    };
    document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "n", bubbles: true}));
    look();
})"""
"""Presses n; milliseconds until the page that begins with this sample stands there."""


def make(url: str, num_samples: int) -> None:
    """Write the set: numbered captions and grids from a pool, in which low codes are frequent."""
    store = open_store(url)
    output = Output(store, OutputSpec(num_tasks=1, source={"command": "benchmark"}, codes=CODES))
    output.begin()
    generator = np.random.default_rng(0)
    captions = [" ".join(generator.choice(WORDS, generator.integers(8, 41))) for _ in range(2000)]
    pool_Nhw = (generator.random((2000, 32, 32)) ** 2 * 4096).astype(np.uint16)
    with TaskWriter(store, 0, ShardLimits()) as writer:
        for number in range(num_samples):
            codes_hw = pool_Nhw[number % len(pool_Nhw)].copy()
            codes_hw[0, :2] = number // 4096, number % 4096
            text = f"{number} {captions[number % len(captions)]}"
            key = f"000000-{number:08d}"
            writer.add(Sample(key=key, data_type="image_text", text=text, codes={"vqcode_512": codes_hw}))
        writer.finish(num_samples)
    output.finish(output.results())


class Viewer:
    """The command, running; `opened_s` is how long its first page took."""

    def __init__(self, url: str) -> None:
        begun = time.perf_counter()
        command = [sys.executable, "-m", "wds_tools", "view", url, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = re.findall(r"http://\S+", self.process.stdout.readline())[0]
        self.connection = http.client.HTTPConnection(self.address.split("/")[2], timeout=120)
        self.get("/api/set")
        assert len(self.get(f"/api/samples?first=0&count={PAGE}")["samples"]) == PAGE
        self.opened_s = time.perf_counter() - begun

    def get(self, path: str) -> Any:
        self.connection.request("GET", path)
        answer = self.connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body[:300]
        return json.loads(body)

    def close(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.wait()


def peak_mb(pid: int) -> float:
    """Highest resident memory of a process so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024


def children(pid: int) -> Iterator[int]:
    """Its processes, but for multiprocessing's own tracker."""
    for name in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if "resource_tracker" not in Path(f"/proc/{name}/cmdline").read_text():
            yield int(name)


def timed_ms(calls: list[Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each call: median, the slowest of twenty, and the slowest."""
    times = []
    for call in calls:
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
    return {
        "median": round(float(np.median(times)), 1),
        "p95": round(float(np.quantile(times, 0.95)), 1),
        "most": round(max(times), 1),
    }


def in_browser(address: str, numbers: list[int]) -> dict[str, Any]:
    """What somebody in front of Chromium waits for; {} where there is none."""
    path = shutil.which("chromium")
    if path is None:
        return {}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        begun = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("#cards:not(.stale) .card")
        opened_s = time.perf_counter() - begun
        turns: list[float] = []
        for number in numbers:
            page.goto(f"{address}?first={number}")
            page.wait_for_selector("#cards:not(.stale) .card")
            turns += [page.evaluate(TURN, number + PAGE), page.evaluate(TURN, number + 2 * PAGE)]
        page.goto(f"{address}sample/{numbers[0]}")
        page.wait_for_selector(".pane img[alt='the picture decoded from its codes']")
        browser.close()
    return {
        "page opened, s": round(opened_s, 2),
        "page turned by a key, ms": {
            "median": round(float(np.median(turns)), 1),
            "p95": round(float(np.quantile(turns, 0.95)), 1),
            "most": round(max(turns), 1),
        },
    }


def search(viewer: Viewer) -> dict[str, float]:
    """A text that is nowhere, to the end."""
    begun, longest_s, calls, after = time.perf_counter(), 0.0, 0, 0
    while after is not None:
        asked = time.perf_counter()
        after = viewer.get(f"/api/search?text=nowhere&after={after}")["next"]
        longest_s = max(longest_s, time.perf_counter() - asked)
        calls += 1
    return {"s": round(time.perf_counter() - begun, 1), "calls": calls, "longest call, s": round(longest_s, 2)}


def measure(url: str, num_samples: int) -> dict[str, Any]:
    """All of it."""
    generator = np.random.default_rng(1)
    viewer = Viewer(url)
    opened = [viewer.opened_s]
    numbers = generator.integers(0, num_samples - 4 * PAGE, 200).tolist()
    found: dict[str, Any] = {
        "page over HTTP, ms": timed_ms([lambda at=at: viewer.get(f"/api/samples?first={at}&count={PAGE}") for at in numbers]),
        "sample over HTTP, ms": timed_ms([lambda at=at: viewer.get(f"/api/sample/{at}") for at in numbers[:100]]),
        "key, ms": timed_ms([lambda at=at: viewer.get(f"/api/find?key=000000-{at:08d}") for at in numbers[:50]]),
        "codebook use of the page, ms": timed_ms([lambda: viewer.get("/api/usage/0/vqcode_512")]),
        "search through all": search(viewer),
        "memory of the viewer, MB": round(peak_mb(viewer.process.pid)),
        "in Chromium": in_browser(viewer.address, numbers[:12]),
    }
    found["memory of the viewer after Chromium, MB"] = round(peak_mb(viewer.process.pid))
    found["memory of the process that decodes, MB"] = [round(peak_mb(pid)) for pid in children(viewer.process.pid)]
    viewer.close()
    for _ in range(4):
        viewer = Viewer(url)
        opened.append(viewer.opened_s)
        viewer.close()
    found["opened, s"] = [round(seconds, 2) for seconds in opened]
    return found


def report(url: str) -> dict[str, Any]:
    """The whole of `wds-tools stats`, on all cores."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "wds_tools", "stats", url, "--workers", str(os.cpu_count()), "--json", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    peaks: dict[int, float] = {}
    output = b""
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None:
        for pid in (process.pid, *children(process.pid)):
            peaks[pid] = peak_mb(pid)
        output += process.stdout.read() or b""
        time.sleep(0.2)
    elapsed_s = time.perf_counter() - begun
    counted = json.loads(output + (process.stdout.read() or b""))["counted"]
    return {"s": round(elapsed_s, 1), "samples/s": round(counted / elapsed_s), "memory, MB": sorted(map(round, peaks.values()))}


def main(num_samples: int) -> None:
    """Serve, write, measure, print."""
    with tempfile.TemporaryDirectory(prefix="wds-tools-view-") as folder, serve_s3(Path(folder)) as server:
        os.environ.update(server.env)
        url = f"s3://{server.bucket}/million"
        begun = time.perf_counter()
        make(url, num_samples)
        print(f"written in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        found = measure(url, num_samples)
        print(json.dumps({"samples": num_samples, **found, "stats": report(url)}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES)
