"""Peak memory of a piece of code in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
# Not getrusage: a child's ru_maxrss begins with its parent's, which hides whatever grows below that. VmHWM begins with the exec.
_MEASURE = """
def peak_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
"""


def grown_mb(setup: str, code: str) -> float:
    """MiB by which `code` raises the peak of resident memory over what it was after `setup` (imports, small preparations)."""
    script = f"{_MEASURE}\n{setup}\n_before = peak_mb()\n{code}\nprint(peak_mb() - _before)"
    done = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])
