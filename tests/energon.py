"""Megatron Energon, as tests call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def energon(*args: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def prepare(folder: Path) -> None:
    """`energon prepare`, as its documentation has it."""
    settings = ["--non-interactive", "--no-progress", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    energon(Path(sys.executable).parent / "energon", "prepare", folder, *settings)
