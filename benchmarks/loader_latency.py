"""Ways to read compared where users are: pairs from an S3 server that is far away (paced_s3.py), in ready batches.

One process on one core, its connections paced; the server has the other core. Of each way: seconds from opening, imports done,
to the first batch, and samples a second from then on, to the end of the epoch or for 8 s. Wall time: this is about waiting.
`bare_mb_per_s` is what 64 GETs of 4 MiB in flight fetch of the same tars, and `server_busy` the share of a core that the server
took for them: where it is near 1, the server was the limit, and nothing can be concluded from the fastest ways.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paced_s3 import BUCKET, bare_gets, serve_paced

LATENCY_MS, MB_PER_S = 30.0, 50.0
TIMEOUT_S = 90.0


def measure(data: Path, ways: list[str], run: Callable[[str, dict[str, str]], dict[str, Any]]) -> dict[str, Any]:
    """Every way once.

    Args:
        data: holds KIND/FORMAT of every way.
        ways: their names.
        run: (way, environment) -> what `paced` prints: {} of a way that reads local files alone, "why" of one that failed.
    """
    buckets = data.parent / "buckets"
    buckets.mkdir(exist_ok=True)
    (buckets / BUCKET).unlink(missing_ok=True)
    (buckets / BUCKET).symlink_to(data)
    results: dict[str, Any] = {"latency_ms": LATENCY_MS, "mb_per_s": MB_PER_S, "ways": {}}
    with serve_paced(buckets, LATENCY_MS, MB_PER_S) as server:
        os.sched_setaffinity(server.pid, {min(os.sched_getaffinity(0))})
        tars = [(str(path.relative_to(data)), path.stat().st_size) for path in sorted((data / "pairs" / "tars").glob("*.tar"))]
        before, begun = server.cpu_s(), time.perf_counter()
        results["bare_mb_per_s"] = bare_gets(server, tars) / 1e6
        results["server_busy"] = (server.cpu_s() - before) / (time.perf_counter() - begun)
        for way in ways:
            found = run(way, server.env)
            if "first_s" in found:
                rate = found["samples"] / found["seconds"] if found["seconds"] else 0.0
                found = {"first_s": found["first_s"], "samples_per_s": rate}
            results["ways"][way] = found
    return results
