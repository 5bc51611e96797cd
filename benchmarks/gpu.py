"""`make bench-gpu`: what encoding reaches on a GPU, in one command of at most 8 minutes, the most telling first.

gpu_stages.py says what is measured. Each figure is printed and written to OUT/gpu.json as it is there, so that what was measured
is kept when time runs out; a measurement that fails says so, and the next one follows. Needs torch with CUDA, diffusers, pyyaml,
scikit-image and Pillow, and transformers for the last networks; no network. `--quick` runs the same code in a reduced size, also
with `--device cpu`: its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_inputs import QUICK, Inputs, Scale
from benchmarks.gpu_stages import Stages
from wds_tools.errors import in_one_line
from wds_tools.vq.registry import find_device

MINUTES = 8.0


class Report:
    """Figures as they come: a line each, and the file."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path, self._results = path, {**head, "rows": []}
        self._begun = time.monotonic()

    def add(self, stage: str, what: str, figures: dict[str, Any]) -> None:
        """One measurement."""
        at = time.monotonic() - self._begun
        self._results["rows"].append({"stage": stage, "what": what, "at_s": round(at, 1), **figures})
        shown = "  ".join(f"{name} {_shown(value)}" for name, value in figures.items())
        print(f"[{at:4.0f} s] {stage}: {what}: {shown}", flush=True)
        self.write("unfinished")

    def write(self, end: str) -> None:
        """The file."""
        temp = self._path.with_suffix(".tmp")
        temp.write_text(json.dumps({**self._results, "end": end}, indent=2) + "\n")
        temp.replace(self._path)


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        versions["cudnn"] = torch.backends.cudnn.version()
    return {"device": name, "cores": os.cpu_count(), "versions": versions, "date": time.strftime("%Y-%m-%d")}


def run(stages: Iterable[Any], report: Report) -> None:
    """All stages, one after the other; what fails does not keep the next from its turn."""
    for stage in stages:
        try:
            for what, figures in stage():
                report.add(stage.__name__, what, figures)
        except Exception as error:  # noqa: BLE001  a rare machine: the rest is worth having
            report.add(stage.__name__, "failed", {"error": in_one_line(error)})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, below a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small network, small pictures: does it run?")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="then it ends, wherever it is")
    parser.add_argument("--stages", nargs="+", help="these alone")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out / "gpu.json", {**machine(device), "is_quick": arguments.quick})

    def stop() -> None:
        report.write("time was up")
        print(f"{arguments.minutes:g} minutes are over; {arguments.out / 'gpu.json'} has what was measured", flush=True)
        os._exit(0)

    alarm = threading.Timer(60 * arguments.minutes, stop)
    alarm.daemon = True
    alarm.start()
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(Inputs(Path(folder), device, QUICK if arguments.quick else Scale())).all()
        run([stage for stage in stages if not arguments.stages or stage.__name__ in arguments.stages], report)
    alarm.cancel()
    report.write("complete")


if __name__ == "__main__":
    main()
