"""`make bench-loader`: the loader against its peers, every figure in the same run, on the same samples.

    speed     samples/s of every way to read, one process on one core          peers/NAME.py, loader_workload.py
    index     `wds-tools index` against `energon prepare` on the same tars      here
    latency   first batch and samples/s of every way from an S3 server far away  loader_latency.py
    s3        bytes/s from S3 against bare GETs                                 loader_s3.py
    restore   first batch after a restore; plan; memory over epochs             loader_restore.py

Everything but latency is measured in rounds in which the ways take turns, each in a process of its own; the figures are medians.
Repetitions of the speed part are left out if they would not fit in --minutes, with what the other parts take on two idle cores.
Writes OUT/loader.json and OUT/loader.svg, prints a table; `--publish` puts both into docs/ (loader_report.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import loader_latency, loader_report, loader_restore, loader_s3
from benchmarks.loader_workload import KINDS, NUM_SAMPLES, digest, read_source, write_source

ROOT = Path(__file__).parents[1]
ROUNDS = 3
PARTS = {"speed": 0.0, "index": 30.0, "restore": 60.0, "latency": 130.0, "s3": 170.0}
"""Name -> seconds that it takes on two idle cores; speed takes what is left."""
MINUTES = 15.0


@dataclass(frozen=True)
class Way:
    """A way to read the samples: benchmarks/peers/MODULE.py."""

    module: str
    title: str
    packages: tuple[str, ...]
    """Whose versions are reported."""
    is_peer: bool = False
    """Lives in the peers' environment."""


WAYS = (  # a way that reads another's files comes after it
    Way("ours", "wds-tools", ("torch", "numpy")),
    Way("shard_dataset", "wds-tools, ShardDataset", ("webdataset",)),
    Way("webdataset", "webdataset", ("webdataset",)),
    Way("hf_webdataset", "Hugging Face over webdataset tars", ("datasets",)),
    Way("hf_map", "Hugging Face map-style, JSON codes", ("datasets",)),
    Way("hf_iterable", "Hugging Face iterable, JSON codes", ("datasets",)),
    Way("hf_arrow", "Hugging Face, uint16 column, Arrow tables", ("datasets", "pyarrow")),
    Way("mosaicml", "MosaicML Streaming", ("mosaicml-streaming", "torch", "numpy"), is_peer=True),
    Way("litdata", "litData", ("litdata", "torch", "numpy"), is_peer=True),
    Way("array_record", "ArrayRecord, batches of 1,024", ("array_record",), is_peer=True),
    Way("grain", "Grain over ArrayRecord", ("grain",), is_peer=True),
    Way("energon", "Megatron-Energon", ("megatron-energon",), is_peer=True),
)


class _Failed(RuntimeError):
    """A way did not do what it was asked for."""


def reason(error: subprocess.CalledProcessError) -> str:
    """Why it failed, in a line: the last exception that it told of, not the line that happened to come last (a progress bar)."""
    lines = [line.strip() for line in (error.stderr or "").replace("\r", "\n").splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    last = (told or lines or ["it said nothing"])[-1]
    how = f"ended by signal {-error.returncode}" if error.returncode < 0 else f"exit status {error.returncode}"
    return f"{how}: {last[:200]}"


class Bench:
    """Runs ways as processes. `missing` says which could not be run, and why: a peer that is not installed is no failure."""

    def __init__(self, out: Path, peers_python: Path) -> None:
        self.data = out / "data"
        self._logs = out.parent
        self._peers_python = peers_python
        self._env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(out / "hf"),
            "HF_DATASETS_OFFLINE": "1",
            "LITDATA_DISABLE_VERSION_CHECK": "1",
        }
        self.missing: dict[str, str] = {}

    def python(self, way: Way) -> str:
        """The interpreter that has its packages."""
        return str(self._peers_python) if way.is_peer else sys.executable

    def run(self, way: Way, command: str) -> list[dict[str, Any]]:
        """What `python -m benchmarks.peers.NAME command` prints; [] and an entry in `missing` if it fails twice."""
        if way.module in self.missing:
            return []
        try:
            for attempt in range(2):  # once more: Python 3.11 itself fails now and then where threads parse npy headers
                try:
                    return self._run(way, command, {}, None)
                except _Failed:
                    if attempt:
                        raise
        except _Failed as error:
            if way.module == "ours":
                raise
            self.missing[way.module] = str(error)
            _say(f"{way.title}: {error}")
        return []

    def paced(self, module: str, env: dict[str, str]) -> dict[str, Any]:
        """What `paced` of a way prints, or {"why": ...}."""
        way = next(way for way in WAYS if way.module == module)
        _say(f"from an S3 server far away: {way.title}")
        try:
            return self._run(way, "paced", {**env, "HF_DATASETS_OFFLINE": "0", "HF_HUB_OFFLINE": "0"}, loader_latency.TIMEOUT_S)[
                0
            ]
        except _Failed as error:
            return {"why": str(error)}

    def _run(self, way: Way, command: str, env: dict[str, str], timeout_s: float | None) -> list[dict[str, Any]]:
        arguments = [self.python(way), "-m", f"benchmarks.peers.{way.module}", command, str(self.data)]
        log = self._logs / f"loader-{way.module}-{command}.log"
        options: dict[str, Any] = {"cwd": ROOT, "env": {**self._env, **env}, "capture_output": True, "text": True}
        try:
            done = subprocess.run(arguments, **options, check=True, timeout=timeout_s)
        except FileNotFoundError:
            raise _Failed(f"no {arguments[0]}: run `make bench-peers`") from None
        except subprocess.TimeoutExpired:
            raise _Failed(f"no end after {timeout_s:.0f} s") from None
        except subprocess.CalledProcessError as error:
            log.write_text(error.stdout + error.stderr)
            raise _Failed(f"{reason(error)} (all that it said: {os.path.relpath(log, ROOT)})") from error
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def write(bench: Bench) -> None:
    """The samples, in every way's format."""
    write_source(bench.data)
    for way in WAYS:
        _say(f"writing for {way.title}")
        bench.run(way, "write")


def speed(bench: Bench, until: float) -> tuple[dict[str, dict[str, float]], int]:
    """Samples per second of each way and measure ("pairs/samples", ...), median of the rounds; and how many rounds there were.

    Args:
        bench: runs them.
        until: no further round begins that would not end by then, in seconds of the monotonic clock.
    """
    _say("verifying that every way yields every sample exactly once")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # not timed, so they may share the machine; the slowest first
        ways = WAYS[::-1]
        for way, results in zip(ways, pool.map(lambda way: bench.run(way, "verify"), ways), strict=True):
            for result in results:
                _check(way, result, _expected(bench.data, result["kind"]))
    speeds: dict[str, dict[str, list[float]]] = {}
    number, begun = 0, time.monotonic()
    while number < ROUNDS and (not number or time.monotonic() + (time.monotonic() - begun) / number < until):
        for way in WAYS:
            _say(f"round {number + 1} of {ROUNDS}: {way.title}")
            for result in bench.run(way, "time"):
                measured = speeds.setdefault(way.module, {}).setdefault(f"{result['kind']}/{result['unit']}", [])
                measured.append(result["samples"] / result["seconds"])
        number += 1
    medians = {
        module: {measure: statistics.median(values) for measure, values in measures.items()}
        for module, measures in speeds.items()
        if module not in bench.missing
    }
    return medians, number


def _expected(data: Path, kind: str) -> dict[str, int]:
    return {"samples": NUM_SAMPLES[kind], "checksum": sum(digest(*sample) for sample in read_source(data / kind)) % 2**64}


def _check(way: Way, result: dict[str, Any], expected: dict[str, int]) -> None:
    found = {name: result[name] for name in expected}
    if found != expected:
        raise RuntimeError(f"{way.title}, {result['kind']} as {result['unit']}: read {found}, expected {expected}")


def index_speed(bench: Bench) -> dict[str, float]:
    """Samples per second of indexing webdataset's tars, as the user's command: start-up, all cores, defaults."""
    tars = sorted((bench.data / "pairs" / "tars").glob("*.tar"))
    energon = Path(bench.python(next(way for way in WAYS if way.module == "energon"))).parent / "energon"
    prepare = [str(energon), "prepare", "--non-interactive", "--no-progress", "--split-ratio", "1,0,0"]
    commands = {
        "ours": [sys.executable, "-m", "wds_tools", "index"],
        "energon": [*prepare, "--sample-type", "CrudeWebdataset"],
    }
    if "energon" in bench.missing:
        del commands["energon"]
    seconds: dict[str, list[float]] = {way: [] for way in commands}
    for _ in range(ROUNDS):
        for way, command in commands.items():
            _say(f"indexing with {way}")
            folder = bench.data / "to_index"
            folder.mkdir()
            for tar in tars:
                os.link(tar, folder / tar.name)
            begun = time.perf_counter()
            subprocess.run([*command, str(folder)], cwd=ROOT, check=True, capture_output=True)
            seconds[way].append(time.perf_counter() - begun)
            shutil.rmtree(folder)
    return {way: NUM_SAMPLES["pairs"] / statistics.median(values) for way, values in seconds.items()}


def _versions(bench: Bench) -> dict[str, str]:
    code = "import sys, importlib.metadata as m; print(*(name + ' ' + m.version(name) for name in sys.argv[1:]), sep='\\n')"
    versions = {"Python": platform.python_version()}
    for way in WAYS:
        if way.module not in bench.missing:
            command = [bench.python(way), "-c", code, *way.packages]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                name, version = line.split()
                versions[f"{name} (peers)" if way.is_peer and versions.get(name, version) != version else name] = version
    return versions


def machine() -> str:
    """Its cores, processor and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores ({cpu or platform.machine()}), {memory:.0f} GB, {platform.system()}"


def _say(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the parts asked for, report, and leave OUT with the results alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers/bin/python"), help="Python of the peers' environment")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all together, about")
    parser.add_argument("--publish", action="store_true", help="write the section and the plot in docs/")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes - sum(PARTS[part] for part in arguments.parts)
    out = arguments.out.resolve() / "loader"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    bench = Bench(out, arguments.peers.absolute())
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "rounds": ROUNDS}
    if set(arguments.parts) != {"s3"}:
        write(bench)
    if "speed" in arguments.parts:
        results["speed"], results["rounds"] = speed(bench, end)
    if "index" in arguments.parts:
        results["index"] = index_speed(bench)
    if "restore" in arguments.parts:
        _say("restore, plan, memory")
        results["restore"] = loader_restore.measure(bench.data / KINDS[0] / "ours", out / "restore")
    if "latency" in arguments.parts:
        ways = [way.module for way in WAYS if way.module not in bench.missing]
        results["latency"] = loader_latency.measure(bench.data, ways, bench.paced)
    if "s3" in arguments.parts:
        _say("S3")
        results["s3"] = loader_s3.measure(out / "s3", ROUNDS)
    results |= {"versions": _versions(bench), "missing": bench.missing, "titles": {way.module: way.title for way in WAYS}}
    (out.parent / "loader.json").write_text(json.dumps(results, indent=2) + "\n")
    loader_report.report(results, out.parent, ROOT / "docs" if arguments.publish else None)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
