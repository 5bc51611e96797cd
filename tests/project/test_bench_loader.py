"""The parts of `make bench-loader` that its figures hang on: the server that is far away, why a way is missing, the table."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from benchmarks.loader import reason
from benchmarks.loader_report import markdown
from benchmarks.paced_s3 import BUCKET, serve_paced

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the kernel paces connections on Linux")
LATENCY_MS, MB_PER_S = 40.0, 4.0
DATA = bytes(range(256)) * 8192


def test_the_server_far_away_answers_as_s3_does_but_late_and_at_its_pace(tmp_path: Path) -> None:
    for name in ("pairs/a/0.tar", "pairs/a/1.tar", "pairs/b.tar"):
        path = tmp_path / BUCKET / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DATA)
    with serve_paced(tmp_path, LATENCY_MS, MB_PER_S) as server:
        settings: Any = {name.lower(): value for name, value in server.env.items() if name.startswith("AWS")}
        store = S3Store(BUCKET, config=settings, client_options={"allow_http": True})
        begun = time.perf_counter()
        assert bytes(obstore.get_range(store, "pairs/b.tar", start=300, end=1300)) == DATA[300:1300]
        assert time.perf_counter() - begun >= LATENCY_MS / 1000
        begun = time.perf_counter()
        assert bytes(obstore.get(store, "pairs/b.tar").bytes()) == DATA
        assert time.perf_counter() - begun >= len(DATA) / (MB_PER_S * 1e6) / 2  # the first packets come in a burst
        assert bytes(obstore.get(store, "pairs/b.tar", options={"range": {"suffix": 10}}).bytes()) == DATA[-10:]
        assert obstore.head(store, "pairs/a/1.tar")["size"] == len(DATA)
        listed = [meta["path"] for page in obstore.list(store, "pairs/a") for meta in page]
        assert listed == ["pairs/a/0.tar", "pairs/a/1.tar"]
        below = obstore.list_with_delimiter(store, "pairs")
        assert [meta["path"] for meta in below["objects"]] == ["pairs/b.tar"]
        assert below["common_prefixes"] == ["pairs/a"]
        with pytest.raises(FileNotFoundError):
            obstore.get(store, "pairs/c.tar")
        assert server.cpu_s() >= 0


@pytest.mark.parametrize(
    ("stderr", "status", "expected"),
    [
        (
            "Traceback\n  x\nValueError: 'Gregory' is no address\nProgress: 41%|##\r",
            1,
            "exit status 1: ValueError: 'Gregory' is no address",
        ),
        (
            "a.b.NotThereError: x\n\nDuring this:\nModuleNotFoundError: No module named 'litdata'\n",
            1,
            "exit status 1: ModuleNotFoundError: No",
        ),
        ("warming up\n", -9, "ended by signal 9: warming up"),
        ("", 3, "exit status 3: it said nothing"),
    ],
)
def test_why_a_peer_is_missing_is_its_exception_and_not_the_line_that_came_last(stderr: str, status: int, expected: str) -> None:
    assert reason(subprocess.CalledProcessError(status, ["x"], "", stderr)).startswith(expected)


def test_the_table_says_of_each_way_what_it_did_from_afar_or_why_not() -> None:
    speeds = {"pairs/samples": 100.0, "pairs/batches": 90.0, "documents/samples": 80.0}
    ways = {"ours": {"first_s": 0.512, "samples_per_s": 1234.0}, "grain": {}, "energon": {"why": "no end after 60 s"}}
    far = {"latency_ms": 30.0, "mb_per_s": 50.0, "bare_mb_per_s": 900.0, "server_busy": 0.25, "ways": ways}
    results = {
        "date": "2026-01-01",
        "machine": "one",
        "rounds": 2,
        "versions": {},
        "missing": {"litdata": "exit status 1: ValueError"},
        "titles": {
            "ours": "Ours",
            "grain": "Grain",
            "energon": "Energon",
            "litdata": "litData",
            "webdataset": "w",
            "hf_map": "h",
            "array_record": "a",
        },
        "speed": dict.fromkeys(ways, speeds),
        "latency": far,
    }
    text = markdown(results)
    assert "| pairs from S3 at 30 ms: first batch, s; then samples/s |" in text
    assert "| 0.51; 1,234 |" in text
    assert "| reads local files alone |" in text
    assert "| failed: no end after 60 s |" in text
    assert "| litData | missing: exit status 1: ValueError | | | |" in text
    assert "900 MB/s, for which the server took 25% of a core" in text
