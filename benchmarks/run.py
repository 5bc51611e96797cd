"""`make bench`: all benchmarks, against the plain way in the same run; a table on the terminal and in bench-out/results.json.

Speeds are medians over rounds in which the ways take turns, each in a process of its own on one core; quote the ratios, since
machines and their neighbours differ.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.containers import BARS, measure
from benchmarks.size import bytes_per_sample
from benchmarks.workload import write_documents

ROUNDS = 5
WAYS = ("floor", "plain", "ours")


def conversion_speed(out: Path, num_documents: int = 60_000) -> dict[str, float]:
    """Documents per second of each way, median over the rounds."""
    write_documents(out / "documents", num_documents)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            target = out / way
            shutil.rmtree(target, ignore_errors=True)
            command = [sys.executable, "-m", "benchmarks.dclm", way, str(out / "documents"), str(target)]
            result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            assert result["documents"] == num_documents, f"{way}: {result}"
            speeds[way].append(num_documents / result["seconds"])
    return {way: statistics.median(values) for way, values in speeds.items()}


def conversion_memory(out: Path, json_bytes: int = 1 << 30) -> dict[str, float]:
    """Peak resident MB of a process that converts 1 GB of documents."""
    written = write_documents(out / "gigabyte", json_bytes // 5900)
    code = (
        "from wds_tools.convert import run_conversion\nfrom wds_tools.convert.documents import DocumentsConfig\n"
        f"run_conversion(DocumentsConfig(input=({str(out / 'gigabyte')!r},), output={str(out / 'converted')!r}, quiet=True))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peak_kib = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {"json_MB": written / 1e6, "peak_MB": peak_kib * 1024 / 1e6}


def main(out: Path) -> None:
    """Run everything under `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    speed = conversion_speed(out / "speed")
    size = bytes_per_sample(out / "size")
    memory = conversion_memory(out / "memory")
    containers = measure(out / "containers")
    print(f"machine: {platform.processor() or platform.machine()}, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("webdataset", "orjson", "zstandard", "datasets")))
    print(f"\nDCLM conversion, one core, median of {ROUNDS} rounds")
    print(f"  floor (decompress, parse)      {speed['floor']:>9,.0f} documents/s")
    print(f"  json + webdataset TarWriter    {speed['plain']:>9,.0f} documents/s")
    print(f"  wds-tools convert documents         {speed['ours']:>9,.0f} documents/s   ", end="")
    print(f"{speed['ours'] / speed['plain']:.1f} x the plain way (bar: 4), ", end="")
    print(f"{speed['ours'] / speed['floor']:.2f} of the floor (bar: 0.5)")
    print("\nBytes on disk per 512 px sample, 40-word caption")
    print(f"  reference's Hugging Face set   {size['reference']:>9,.0f}")
    print(f"  webdataset TarWriter           {size['webdataset']:>9,.0f}")
    print(f"  wds-tools, index included      {size['ours']:>9,.0f}   (bar: 4,200)")
    print(f"\nMemory: converting {memory['json_MB']:,.0f} MB of DCLM peaks at {memory['peak_MB']:,.0f} MB (bar: 400)")
    print(f"\nContainers into shards, one core, MB of input a second, median of {ROUNDS} rounds")
    for kind, found in containers.items():
        print(f"  {kind:<8} plain {found['plain']:>7,.0f}   wds-tools {found['ours']:>7,.0f}   ", end="")
        print(f"{found['ours'] / found['plain']:.2f} of it (bar: {BARS[kind]})")
    for folder in ("speed", "size", "memory", "containers"):
        shutil.rmtree(out / folder)
    (out / "results.json").write_text(
        json.dumps({"speed": speed, "size": size, "memory": memory, "containers": containers}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench-out"))
